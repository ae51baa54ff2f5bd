"""Every code block of the documentation and the README runs, page by page, in a folder of its own."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODEL_PY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv1(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.layer1 = nn.Sequential(Block(12), Block(12))
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        return self.last(self.layer1(self.conv1(x)).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net().eval()
"""


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language; on a machine without a GPU, without the lines that name one."""
    found = [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]
    if not torch.cuda.is_available():
        found = ["\n".join(line for line in text.splitlines() if "cuda" not in line) for text in found]
    return found


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the pages assume."""
    (tmp_path / "model.py").write_text(MODEL_PY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("model", None)
    import model

    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    built = model.build()
    return {
        "__name__": "__main__",  # some decorators look their function's module up
        "torch": torch,
        "nn": nn,
        "convsplit": convsplit,
        "model": built,
        "images": images,
        "batches": list(images.split(4)),
        "build_model": model.build,
        "converted": convsplit.convert(built, forms="dw-pw", rank=2),
    }


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, names: dict[str, object]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda page: page.name)
def test_commands_run(page: Path, names: dict[str, object]) -> None:
    for line in "\n".join(blocks(page, "sh")).splitlines():
        if line.startswith("convsplit "):
            assert main(shlex.split(line)[1:]) == 0, line


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in navigation
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_doctests_are_fenced_up_to_the_next_blank_line() -> None:
    pytest.importorskip("griffe")
    sys.path.insert(0, str(ROOT / "docs"))
    from fences import fenced

    told = "Says.\n\n>>> a[0]\n[1, 2]\n>>> b\n3\n\nThen more."
    assert fenced(told) == "Says.\n\n```pycon\n>>> a[0]\n[1, 2]\n>>> b\n3\n```\n\nThen more."
    assert fenced("Nothing to run: a > b.") == "Nothing to run: a > b."


def test_version_and_date_of_the_release_are_the_same_everywhere() -> None:
    changelog, citation = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff"))
    version, date = re.search(r"^## (\d\S+) - (\S+)$", changelog, re.MULTILINE).groups()
    assert version == convsplit.__version__
    assert re.findall(r"^(?:version|date-released): (\S+)$", citation, re.MULTILINE) == [version, date]
    assert (ROOT / "docs" / "releases" / f"{version}.md").exists()
