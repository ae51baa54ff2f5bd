"""The examples: the trained network they start from, and the command that the README begins with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch):
    """The module examples/digits.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digits

    return digits


def example(command: str) -> str:
    """What a command that begins with `python` prints."""
    python, *arguments = command.split()
    assert python == "python"
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_trained_network_is_as_good_as_the_readme_says(digits):
    images, labels = digits.digits()[2:]
    stated = float(re.search(r"tells ([\d.]+) % of 500 test images right", README)[1])
    right = 100 * digits.accuracy(digits.trained(), images, labels)
    assert right == pytest.approx(stated, abs=0.2)  # one image: machines round differently


def test_the_trained_network_is_stored_in_half_precision_with_a_tensor_for_each_of_its_own(digits):
    stored = load_file(digits.TRAINED)
    state = digits.small_resnet(seed=0).state_dict()
    assert {name: value.shape for name, value in stored.items()} == {n: v.shape for n, v in state.items()}
    assert {value.dtype for value in stored.values()} == {torch.float16, torch.int64}


@pytest.mark.slow
def test_the_first_command_of_the_readme_converts_at_once():
    printed = example(re.search(r"&& (python examples/\S+)$", README, re.MULTILINE)[1])
    assert "Training" not in printed
    assert re.search(r"The plan.*\n.*3\.conv1.*The report.*Accuracy", printed, re.DOTALL)
    rows = re.findall(r"^ (dense|params=[\d.]+) +([\d.]+) k +([\d.]+)", printed, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["dense", "params=0.5", "params=0.25", "params=0.125"]
    params, accuracies = ([float(row[column]) for row in rows] for column in (1, 2))
    assert params == sorted(params, reverse=True)
    assert accuracies[0] > 0.99
    assert accuracies[1] > accuracies[0] - 0.02


@pytest.mark.slow
def test_the_network_can_be_trained_anew(digits, tmp_path):
    file = tmp_path / "again.safetensors"
    assert str(file) in example(f"python examples/train_digits.py --epochs 2 --out {file}")
    model = digits.small_resnet(seed=0)
    model.load_state_dict(load_file(file))
    images, labels = digits.digits()[2:]
    assert digits.accuracy(model, images, labels) > 0.8
