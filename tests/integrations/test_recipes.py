"""Every code block of docs/integrations runs, page by page, in a folder of its own.

Blocks that begin with "# a fresh process" run in one, in the same folder.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import convsplit
from convsplit.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "integrations"
NEEDS = {
    "index": [],
    "ultralytics": ["ultralytics"],
    "segmentation": ["segmentation_models_pytorch", "lightning", "onnxruntime"],
    "huggingface": ["diffusers", "transformers", "accelerate", "onnxruntime"],
    "monai": ["monai", "onnxruntime"],
    "onnx": ["onnxruntime"],
}
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), torch.nn.ReLU()]
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4)
    ).eval()


@pytest.mark.parametrize("page", sorted(NEEDS))
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[page]:
        pytest.importorskip(package, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = torch.rand(8, 3, 16, 16)
    names = {"__name__": "__main__", "convsplit": convsplit, "model": small(), "images": images}
    names["batches"] = list(images.split(4))
    blocks = BLOCK.findall((FOLDER / f"{page}.md").read_text(encoding="utf-8"))
    for kind, block in blocks:
        if kind == "python" and block.startswith("# a fresh process"):
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            run = {"capture_output": True, "text": True, "check": False, "env": {**os.environ, "PYTHONPATH": path}}
            done = subprocess.run([sys.executable, "-c", block], **run)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout
        elif kind == "python":
            exec(compile(block, page, "exec"), names)
    commands = [line for kind, block in blocks if kind == "sh" for line in block.splitlines()]
    for line in commands:
        if line.startswith("convsplit "):
            assert main([*shlex.split(line.replace("photos/", "8x3x16x16"))[1:], "--quiet"]) == 0, line


def test_every_page_is_listed_and_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = sorted(FOLDER.glob("*.md"))
    assert {page.stem for page in pages} == NEEDS.keys()
    for page in pages:
        assert f": integrations/{page.name}" in navigation
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
