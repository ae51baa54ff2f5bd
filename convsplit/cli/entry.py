"""The command line: parses, calls the API, prints. Results go to stdout, progress and messages to stderr.

Exit codes:
    0    done
    1    the operation failed; one line on stderr says why (--debug adds the traceback)
    2    the command line itself is wrong
    130  interrupted with Ctrl-C; no output file is left half-written

A command is one function in commands.py.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import convsplit.cli.commands  # noqa: F401 - registers them
from convsplit.cli.parser import build_parser

DONE, FAILED, INTERRUPTED = 0, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    >>> main(["plan", "torch.nn:Conv2d", *"--model-arg in_channels=8 --model-arg out_channels=8".split(),
    ...       *"--model-arg kernel_size=3 --rank 1 --forms dw-pw --json".split()])  # doctest: +ELLIPSIS
    {
     "format": 1,
    ...
    0
    """
    parser = build_parser()
    try:
        args = parser.parse(argv)
    except SystemExit as leaving:  # --help and usage errors; argparse has printed what there is to say
        return int(leaving.code or DONE)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            args.run(args)
        except SystemExit as leaving:  # a usage error that only the command could see
            return int(leaving.code or DONE)
        except KeyboardInterrupt:
            print("convsplit: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return DONE
        except Exception as error:
            _explain(error, debug=args.debug)
            return FAILED
    return DONE


def _explain(error: Exception, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    expected = isinstance(error, ValueError | OSError | ImportError | KeyError | TypeError)
    # str of a KeyError is the repr of its message
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    what = text if expected and text else f"{type(error).__name__}: {text}"
    hint = "" if expected or debug else " (--debug shows the traceback)"
    print(f"convsplit: {what}{hint}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if not issubclass(category, DeprecationWarning):
        print(f"convsplit: warning: {message}", file=sys.stderr)
