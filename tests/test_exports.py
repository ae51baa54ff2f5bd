"""export: files that give what the module gives, in its runtime, or no file at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import convsplit
from convsplit import Budget, exports
from convsplit.exports import SUFFIXES, export
from convsplit.runtimes import RUNTIMES


def needs(runtime: str) -> None:
    if RUNTIMES[runtime].missing:
        pytest.skip(f"{runtime} needs {', '.join(RUNTIMES[runtime].missing)}")


def converted(**options: object) -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2)]
    net = nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)).eval()
    return convsplit.convert(net, **options)


OPTIONS = [
    {"forms": ["dw-pw", "pw-dw"], "budget": Budget(params=0.6)},
    {"forms": "dw-pw", "rank": 2},
    {"forms": "pw-dw-pw", "rank": 8},
]


@pytest.mark.parametrize("runtime", SUFFIXES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_are_checked_and_kept(runtime: str, options: dict, tmp_path: Path) -> None:
    needs(runtime)
    net, x = converted(**options), torch.randn(1, 3, 16, 16)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    done = export(net, tmp_path / f"new/net{SUFFIXES[runtime]}", x, runtime=runtime, seconds=0.05)
    assert done.difference < 1e-4
    assert done.path.exists()
    assert sorted(done.path.parent.iterdir()) == sorted(done.files)
    assert min(done.milliseconds) > 0
    assert f"in {runtime} {RUNTIMES[runtime].version}: outputs differ by" in str(done)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("runtime", SUFFIXES)
def test_dimensions_that_vary_do(runtime: str, tmp_path: Path) -> None:
    needs(runtime)
    net = converted(**OPTIONS[0])
    path = tmp_path / f"net{SUFFIXES[runtime]}"
    export(net, path, torch.randn(1, 3, 16, 16), runtime=runtime, dynamic=(0, 2, 3), seconds=0.05)
    run = exports._loaded(path)
    for shape in ((1, 3, 16, 16), (5, 3, 20, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x)[0], net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runtime", SUFFIXES)
def test_what_does_not_vary_is_refused_and_the_old_file_stays(runtime: str, tmp_path: Path) -> None:
    needs(runtime)

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(int(x.shape[0]), 3, 8, 8).flatten(1) if x.shape[-1] == 8 else x.new_zeros(x.shape[0], 7)

    path = tmp_path / f"net{SUFFIXES[runtime]}"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"is not kept: |cannot be exported"):
        export(Fixed(), path, torch.randn(2, 3, 8, 8), runtime=runtime, dynamic=(0, 2, 3), seconds=0.05)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, folded = converted(**OPTIONS[1]), exports.folded

    def wrongly(*given: object) -> nn.Module:
        found = folded(*given)  # type: ignore[arg-type]
        next(found.parameters()).mul_(1.01)
        return found

    monkeypatch.setattr(exports, "folded", wrongly)
    with pytest.raises(ValueError, match="outputs differ from the module's by"):
        export(net, tmp_path / "net.pt2", torch.randn(1, 3, 16, 16), runtime="torch")
    assert not list(tmp_path.iterdir())


def test_a_name_that_does_not_fit_the_runtime_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"want \.onnx for 'onnxruntime', \.xml for 'openvino', \.pt2 for 'torch'"):
        export(converted(rank=2, forms="dw-pw"), tmp_path / "net.pt", torch.randn(1, 3, 16, 16), runtime="torch")


def test_inputs_have_the_names_of_arguments(tmp_path: Path) -> None:
    needs("onnxruntime")
    onnx = pytest.importorskip("onnx")

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, image, scale):
            return self.conv(image) * scale

    image, scale = torch.randn(1, 3, 8, 8), torch.ones(1)
    for batch in ((image, scale), {"image": image, "scale": scale}):
        export(Two().eval(), tmp_path / "two.onnx", batch, seconds=0.05)
        assert [each.name for each in onnx.load(tmp_path / "two.onnx").graph.input] == ["image", "scale"]
