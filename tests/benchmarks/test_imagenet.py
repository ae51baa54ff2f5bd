"""The recipe for ImageNet runs on a folder of that shape, and measures images that repair has not seen."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")

from benchmarks.results import number  # noqa: E402
from benchmarks.suites import imagenet  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    for label in range(3):
        place = tmp_path / "val" / f"n{label}"
        place.mkdir(parents=True)
        for index in range(6):
            pixels = torch.randint(0, 256, (60, 40 + 10 * index, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(place / f"{index}.JPEG")
    return tmp_path


def given(*words: str):
    parser = ArgumentParser()
    imagenet.options(parser)
    return parser.parse_args(list(words))


def test_images_for_repair_are_not_measured(folder: Path) -> None:
    known, tests = imagenet.split(given("--imagenet", str(folder), "--calibration", "8"))
    assert len(known) == 8
    assert len(tests) == 10
    assert not {path for path, _ in known} & {path for path, _ in tests}
    assert all(path.parent.name == f"n{label}" for path, label in known + tests)
    with pytest.raises(ValueError, match="too few"):
        imagenet.split(given("--imagenet", str(folder), "--calibration", "100"))


def test_a_picture_is_the_centre_of_the_image_normalised(folder: Path) -> None:
    grey = folder / "grey.png"
    Image.new("RGB", (500, 300), (124, 116, 104)).save(grey)
    seen = imagenet.picture(grey)
    assert seen.shape == (3, 224, 224)
    assert seen.abs().max() < 0.02  # the mean of ImageNet


def test_top_one_and_top_five_are_counted(folder: Path) -> None:
    class Always(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([5.0, 9.0, 1.0, 2.0, 3.0, 4.0]).expand(len(images), 6)

    found = imagenet.top(Always(), imagenet.labelled(folder / "val"), 4)
    assert (found.one, found.five, found.total) == (6, 12, 18)  # class 1 is first, class 2 is last


@pytest.mark.slow
def test_the_whole_recipe(folder: Path) -> None:
    words = ["--imagenet", str(folder), "--weights", "none", "--networks", "squeezenet1_1", "--speedups", "1.5"]
    (sheet,) = imagenet.measure(given(*words, "--calibration", "8", "--batch", "4", "--seconds", "0.5"))
    rows = {row[2]: dict(zip(sheet.table.headings, row, strict=True)) for row in sheet.table.rows}
    assert set(rows) == {"", "no data", "repaired", "distilled"}
    whole, kept = (number(rows[way]["MACs"]) for way in ("", "repaired"))
    assert whole == pytest.approx(349e6, rel=0.01)
    assert kept <= whole / 1.5 * 1.01
