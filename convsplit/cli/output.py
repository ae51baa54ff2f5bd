"""What commands leave behind: text on stdout, and files that are written whole or not at all."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convsplit.files import write_whole as replace_whole


def terminal_width() -> int | None:
    """Columns of the terminal stdout goes to; None where it goes to a file or a pipe, which have no width."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_json(value: Any) -> None:
    """Print plain values as JSON."""
    print(json.dumps(value, indent=1))


def write(path: Path, text: str) -> None:
    """Replace a file by a text in one step."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a new file beside `path` and put it in its place; interrupted, it leaves `path` as it was."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    replace_whole(path, save)
