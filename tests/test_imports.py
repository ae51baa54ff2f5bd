"""The order of the rooms: a file imports only from files above it in this list."""

import ast
import re
from pathlib import Path

import pytest

import convsplit

ROOMS = [
    "progress", "parallel", "layout", "spec", "tables", "lowrank", "forms", "layers", "kinds", "trace", "sites",
    "moments", "sensitivity", "options", "latency", "plan", "knapsack", "allocate", "rewrite", "speed", "refit",
    "report", "plots", "storage", "finetune", "inference", "api", "passes", "frontier", "bench", "cli",
]  # fmt: skip
PACKAGE = Path(convsplit.__file__).parent


def rooms_imported(source: Path) -> set[str]:
    """Names of the rooms that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(re.findall(r"^convsplit\.(\w+)", node.module))
        elif isinstance(node, ast.Import):
            found.update(match for name in node.names for match in re.findall(r"^convsplit\.(\w+)", name.name))
    return found


@pytest.mark.parametrize("source", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(source: Path) -> None:
    room = source.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, f"{room} has no place in the order of the rooms"
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert rooms_imported(source) <= allowed


def test_only_lowrank_imports_tensorly() -> None:
    users = {p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py") if "import tensorly" in p.read_text()}
    assert users == {"lowrank"}


def test_public_names_are_documented() -> None:
    public = [getattr(convsplit, name) for name in vars(convsplit) if name[0] != "_"]
    undocumented = [o.__name__ for o in public if callable(o) and not (o.__doc__ or "").strip()]
    assert not undocumented
