"""Run a benchmark.

    python -m benchmarks --list
    python -m benchmarks NAME [--quick] [--json FILE] [arguments of the suite; NAME --help tells them]
    python -m benchmarks page                          # docs and README from the stored results
    python -m benchmarks regress OLD.json NEW.json     # exit 1 where something got worse

A suite prints its tables as Markdown as they come; `--json FILE` keeps the result, and Markdown beside it.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from benchmarks import suites
from benchmarks.results import Result, Sheet

TOOLS = ("page", "regress")


def main(words: list[str]) -> int:
    if words and words[0] in TOOLS:
        return int(importlib.import_module(f"benchmarks.{words[0]}").main(words[1:]))
    if words == ["--list"]:
        print("\n".join(f"{name:20} {_first_line(suite(name))}" for name in names()))
        return 0
    if not words or words[0] not in names():
        print(__doc__, "\nSuites: " + ", ".join(names()), file=sys.stderr)
        return 2
    run(words[0], words[1:])
    return 0


def names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(suites.__path__)]


def suite(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.suites.{name}")


def run(name: str, words: list[str]) -> Result:
    """Measure, print and keep one suite."""
    module = suite(name)
    parser = argparse.ArgumentParser(
        f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: what CI compares")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result, and Markdown beside it")
    module.options(parser)
    if "--quick" in words:
        parser.set_defaults(**module.QUICK)  # what is said beside --quick holds
    arguments = parser.parse_args(words)
    sheets: list[Sheet] = []
    for sheet in module.measure(arguments):
        print(f"{sheet.markdown()}\n", flush=True)
        sheets.append(sheet)
    result = Result(name, " ".join(["python -m benchmarks", name, *_told(words)]), sheets)
    if arguments.json:
        result.write(arguments.json)
    return result


def _told(words: list[str]) -> list[str]:
    """The command without where it was told to write, and files without their folders."""
    shown = [f'"{word}"' if " " in word else Path(word).name if word.endswith(".py") else word for word in words]
    at = shown.index("--json") if "--json" in shown else len(shown)
    return shown[:at] + shown[at + 2 :]


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
