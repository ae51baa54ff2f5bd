"""The parser, built from the commands: each is a function, its docstring the help, its decorator the arguments."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

Run = Callable[[argparse.Namespace], None]
Arguments = Callable[[argparse.ArgumentParser], object]

EXIT_CODES = "exit codes: 0 done, 1 the operation failed, 2 wrong usage, 130 interrupted"


@dataclass(frozen=True)
class Command:
    """A command: its name and help are the function's name and docstring."""

    run: Run
    arguments: tuple[Arguments, ...]

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def summary(self) -> str:
        return self._help[0].rstrip(".")

    @property
    def details(self) -> str:
        return "\n".join(self._help[1:]).strip("\n")

    @property
    def _help(self) -> list[str]:
        return (inspect.getdoc(self.run) or "").splitlines() or [""]


COMMANDS: dict[str, Command] = {}


def command(*arguments: Arguments) -> Callable[[Run], Run]:
    """Make a function a command that takes these groups of arguments."""

    def register(run: Run) -> Run:
        COMMANDS[run.__name__] = Command(run, arguments)
        return run

    return register


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that suggests the nearest name where one was mistyped."""

    def error(self, message: str) -> NoReturn:
        super().error(message + self._suggestion(message))

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Like `parse_args`, but an unknown option is reported by the command it was given to."""
        known, extra = self.parse_known_args(argv)
        if extra:
            getattr(known, "parser", self).error(f"unrecognised arguments: {' '.join(extra)}")
        return known

    def _suggestion(self, message: str) -> str:
        if wrong := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            return did_you_mean(wrong[1], [name.strip(" '") for name in wrong[2].split(",")])
        if wrong := re.search(r"unrecognised arguments: (--[\w-]+)", message):
            return did_you_mean(wrong[1], self._option_string_actions)
        return ""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A question to end an error message with, empty where nothing is near.

    >>> did_you_mean("resnet81", ["resnet18", "resnet50", "vgg16"])
    '; did you mean resnet18?'
    """
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> Parser:
    """The parser of all registered commands."""
    from convsplit import __version__

    parser = Parser(
        prog="convsplit",
        description="Turn the convolutions of a trained PyTorch model into depthwise-separable ones.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"convsplit {__version__}")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for each in COMMANDS.values():
        sub = parsers.add_parser(
            each.name,
            help=each.summary,
            description=f"{each.summary}.",
            epilog=f"{each.details}\n\n{EXIT_CODES}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for add in each.arguments:
            add(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=each.run, parser=sub)
    return parser
