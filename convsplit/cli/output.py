"""What commands leave behind: text on stdout, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convsplit import storage


@contextmanager
def results_only() -> Iterator[None]:
    """Keep stdout for what Python prints: what libraries in C print, such as the solver, goes to stderr."""
    try:
        if sys.stdout.fileno() != 1:
            raise ValueError
    except (OSError, ValueError):  # stdout was replaced by something else, which C knows nothing of
        yield
        return
    sys.stdout.flush()
    python = sys.stdout
    with open(os.dup(1), "w", encoding=python.encoding, errors=python.errors) as results:
        os.dup2(2, 1)
        sys.stdout = results
        try:
            yield
        finally:
            sys.stdout = python
            results.flush()
            os.dup2(results.fileno(), 1)


def terminal_width() -> int | None:
    """Columns of the terminal stdout goes to; None where it goes to a file or a pipe, which have no width."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(value: Any) -> None:
    """Print plain values as JSON."""
    print(json.dumps(value, indent=1))


def say(message: str) -> None:
    """Tell the user something that is not the result."""
    print(message, file=sys.stderr)


def write(path: Path, text: str) -> None:
    """Replace a file by a text in one step."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a new file beside `path` and put it in its place; interrupted, it leaves `path` as it was."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    storage.write_whole(path, save)
