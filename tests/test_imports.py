"""The order of the rooms: files and folders import one way, and no function hides the module of its name."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import convsplit

ROOMS = [
    "progress", "parallel", "precision", "files", "spec", "tables", "lowrank", "forms", "structure", "layers",
    "kinds", "model", "data", "choose", "initialise", "rewrite", "norms", "folding", "runtimes", "measure", "exports",
    "repair", "report", "storage", "checkpoints", "searches", "studies", "finetune", "api", "passes", "integrations",
    "cli",
]  # fmt: skip
PACKAGE = Path(convsplit.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(source: Path) -> set[str]:
    """Modules of convsplit that a file imports, at its head, inside functions or for its annotations."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.update(re.findall(r"^convsplit\.([\w.]+)", node.module))
        elif isinstance(node, ast.Import):
            found.update(match for name in node.names for match in re.findall(r"^convsplit\.([\w.]+)", name.name))
    return found


def module_of(source: Path) -> str:
    return ".".join(source.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("source", SOURCES, ids=module_of)
def test_folders_import_one_way(source: Path) -> None:
    room = module_of(source).split(".")[0]
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, f"{room} has no place in the order of the rooms"
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert {name.split(".")[0] for name in imported(source)} <= allowed


def test_files_import_one_way() -> None:
    try:
        TopologicalSorter({module_of(source): imported(source) for source in SOURCES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_lowrank_imports_tensorly() -> None:
    users = {p.relative_to(PACKAGE).parts[0] for p in SOURCES if "import tensorly" in p.read_text()}
    assert users == {"lowrank"}


def packages() -> Iterator[ModuleType]:
    yield convsplit
    for found in pkgutil.walk_packages(convsplit.__path__, "convsplit."):
        if found.ispkg:
            yield importlib.import_module(found.name)


@pytest.mark.parametrize("package", list(packages()), ids=lambda package: package.__name__)
def test_no_name_hides_a_module(package: ModuleType) -> None:
    for found in pkgutil.iter_modules(package.__path__):
        if found.name == "__main__":
            continue
        try:
            module = importlib.import_module(f"{package.__name__}.{found.name}")
        except ImportError:
            assert package.__name__ == "convsplit.integrations"  # of a library that is not installed
            continue
        assert getattr(package, found.name) is module


def test_importing_convsplit_imports_no_integration() -> None:
    code = "import sys, convsplit; print([name for name in sys.modules if name.startswith('convsplit.integrations')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_are_documented() -> None:
    public = [getattr(convsplit, name) for name in vars(convsplit) if name[0] != "_"]
    undocumented = [o.__name__ for o in public if callable(o) and not (o.__doc__ or "").strip()]
    assert not undocumented
