"""Each kind of convolution through its whole life: planned, converted, repaired, trained, merged, kept and exported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit import Budget, Stopwatch
from convsplit.data.walk import Stop
from convsplit.forms import grouped
from convsplit.layers.separable import SeparableConv
from convsplit.repair.samples import Moments, take_samples
from convsplit.repair.solve import Metric, quadratics
from convsplit.spec import CONVOLUTIONS, ConvSpec, axes_of

KINDS = [kind for kind in CONVOLUTIONS if kind != (2, False)]
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SIZES = {1: (20,), 2: (8, 9), 3: (5, 6, 4)}


def name_of(kind: tuple[int, bool]) -> str:
    return CONVOLUTIONS[kind].__name__


def smooth(kind: Any, *numbers: Any, terms: int = 40, **more: Any) -> nn.Module:
    """A convolution whose kernel has a falling spectrum, as trained ones have."""
    conv = kind(*numbers, **more)
    across, within, *_ = conv.weight.shape
    W = sum(
        0.85**r * torch.randn(across, 1, 1) * torch.randn(within, 1) * torch.randn(conv.weight[0, 0].numel())
        for r in range(terms)
    )
    conv.weight.data = (W / W.square().sum((1, 2)).mean().sqrt()).reshape(conv.weight.shape)
    return conv


def network(axes: int, transposed: bool) -> nn.Sequential:
    """Strided, grouped and with batch norm, so that every stage of a layer's life has something to do."""
    torch.manual_seed(0)
    kind, norm = CONVOLUTIONS[axes, transposed], NORMS[axes]
    model = nn.Sequential(
        smooth(kind, 8, 16, 3, stride=2, padding=1), norm(16), nn.ReLU(),
        smooth(kind, 16, 16, 3, padding=1, groups=2, bias=False), norm(16), nn.ReLU(),
        smooth(kind, 16, 12, (3, 1, 1)[:axes] if axes > 1 else 5, padding=1),
    )  # fmt: skip
    for each in (model[1], model[4]):
        each.running_mean.normal_(0, 0.1), each.running_var.uniform_(0.5, 1.5)
    return model.eval()


def maps(axes: int, count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, *SIZES[axes], generator=generator)
    return x + x.roll(1, -1) + x.roll(1, 1)  # neighbours alike, as in images


def drift(converted: nn.Module, model: nn.Module, x: Tensor) -> float:
    return convsplit.compare(converted, model, x).drift.relative


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_repair_reconstruction_and_distillation_help(kind: tuple[int, bool]) -> None:
    model, x = network(*kind), maps(kind[0], 96)
    data, held_out = list(x[:64].split(16)), x[64:]
    plain = convsplit.convert(model, x[:1], budget=Budget(params=0.5))
    repaired = convsplit.convert(model, calibration=data, budget=Budget(params=0.5))
    before, after = drift(plain, model, held_out), drift(repaired, model, held_out)
    assert after < 0.9 * before
    trained = copy.deepcopy(repaired)
    blocks = convsplit.reconstruct(trained, model, data, steps=30)
    assert any(block.after < block.before for block in blocks)
    distilled = copy.deepcopy(repaired)
    convsplit.distill(distilled, model, data, epochs=3)
    assert drift(distilled, model, held_out) < 1.05 * after


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_kept_merged_folded_and_told(kind: tuple[int, bool], tmp_path: Path) -> None:
    model, x = network(*kind), maps(kind[0], 8)
    plan = convsplit.make_plan(model, x[:1], budget=Budget(macs=0.5))
    assert convsplit.Plan.from_json(plan.to_json()) == plan
    assert len(plan.split) >= 2
    converted = convsplit.apply_plan(model, plan)
    report = convsplit.compare(converted, model, x)
    assert report.macs[1] - report.macs[0] == plan.totals()["macs_after"] - plan.totals()["macs_before"]
    convsplit.save(converted, tmp_path / "small.safetensors")
    again = convsplit.load(tmp_path / "small.safetensors", network(*kind))
    assert torch.equal(again(x), converted(x))
    merged = convsplit.merge(converted)
    assert {type(module) for module in merged if hasattr(module, "stride")} == {CONVOLUTIONS[kind]}
    torch.testing.assert_close(merged(x), converted(x), rtol=1e-4, atol=1e-4)
    for before in (converted, merged):
        deployed = convsplit.for_inference(before, x)
        assert isinstance(deployed[1], nn.Identity)
        torch.testing.assert_close(deployed(x), converted(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_exported(kind: tuple[int, bool], tmp_path: Path) -> None:
    import onnxruntime

    model, x = network(*kind), maps(kind[0], 4)
    for forms in ("dw-pw", "pw-dw", "pw-dw-pw"):
        converted = convsplit.convert(model, x, budget=Budget(params=0.6), forms=forms)
        program = torch.export.export(converted, (x,))
        torch.testing.assert_close(program.module()(x), converted(x), rtol=1e-4, atol=1e-4)
        torch.onnx.export(converted, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.as_tensor(answer), converted(x), rtol=1e-3, atol=1e-3)


def pointwise_network(axes: int) -> nn.Sequential:
    """A bottleneck of 1x1 kernels around a wider one."""
    torch.manual_seed(0)
    kind, norm = CONVOLUTIONS[axes, False], NORMS[axes]
    model = nn.Sequential(
        smooth(kind, 8, 32, 1, bias=False), norm(32), nn.ReLU(), smooth(kind, 32, 32, 3, padding=1), nn.ReLU(),
        smooth(kind, 32, 16, 1, stride=2), CONVOLUTIONS[axes, True](16, 12, 1, stride=2),
    )  # fmt: skip
    model[1].running_mean.normal_(0, 0.1), model[1].running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_pointwise_kernels_are_repaired_trained_and_exported(axes: int, tmp_path: Path) -> None:
    model, x = pointwise_network(axes), maps(axes, 96)
    data, held_out = list(x[:64].split(16)), x[64:]
    plain = convsplit.convert(model, x[:1], rank=5, forms="pw-pw")
    repaired = convsplit.convert(model, calibration=data, rank=5, forms="pw-pw")
    assert sum(layer.form == "pw-pw" for layer in repaired.modules() if isinstance(layer, SeparableConv)) >= 2
    before, after = drift(plain, model, held_out), drift(repaired, model, held_out)
    assert after < 0.9 * before
    trained = copy.deepcopy(repaired)
    assert any(block.after < block.before for block in convsplit.reconstruct(trained, model, data, steps=30))
    distilled = copy.deepcopy(repaired)
    convsplit.distill(distilled, model, data, epochs=3)
    assert drift(distilled, model, held_out) < 1.15 * after  # the repair of a matrix leaves next to nothing to gain
    done = convsplit.export(repaired, tmp_path / "model.onnx", x[:2], seconds=0.05)
    assert done.difference < 1e-4


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_files_of_repaired_models_are_checked_in_their_runtime(kind: tuple[int, bool], tmp_path: Path) -> None:
    model, x = network(*kind), maps(kind[0], 32)
    converted = convsplit.convert(model, calibration=list(x.split(16)), budget=Budget(params=0.6))
    for name in ("model.onnx", "model.pt2"):
        runtime = "onnxruntime" if name.endswith("onnx") else "torch"
        assert convsplit.export(converted, tmp_path / name, x[:2], runtime=runtime, seconds=0.05).difference < 1e-4


@pytest.mark.clock
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_time_is_measured(kind: tuple[int, bool], runtime: str) -> None:
    torch.manual_seed(0)
    axes = kind[0]
    model = nn.Sequential(CONVOLUTIONS[kind](64, 64, 5 if axes == 1 else 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(1, 64, *{1: (256,), 2: (16, 16), 3: (6, 8, 8)}[axes])
    stopwatch = Stopwatch(1.0, runtime=runtime)
    plan = convsplit.make_plan(model, x, budget=Budget(params=1.0), prefer="speed", stopwatch=stopwatch)
    layer = plan.layer("0")
    assert layer.dense.milliseconds > 0
    assert layer.option.milliseconds <= layer.dense.milliseconds


def responses(conv: nn.Module, x: Tensor, groups: int) -> Tensor:
    """What each position of the kernel of a group's output channel answers alone: [G, positions, n]."""
    found = []
    for part in x.chunk(groups, 1):
        within = part.shape[1]
        one = replace(ConvSpec.of(conv), in_channels=within, out_channels=1, groups=1).conv(device="cpu")
        units = torch.eye(one.weight.numel()).reshape(-1, *one.weight.shape)
        answers = [torch.func.functional_call(one, {"weight": unit}, (part,)).flatten() for unit in units]
        found.append(torch.stack(answers))
    return torch.stack(found)


@pytest.mark.parametrize("kind", list(CONVOLUTIONS), ids=name_of)
def test_moments_give_the_dense_least_squares_solution(
    kind: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For noisy answers, at all strides and phases; the oracle knows no more of a convolution than how to run it."""
    monkeypatch.setattr("convsplit.data.moments.POSITIONS_PER_UNKNOWN", 10**9)
    torch.manual_seed(0)
    axes, transposed = kind
    for stride, groups in ((1, 1), (2, 2), (3, 1)):
        further: dict[str, Any] = {"output_padding": 1} if transposed and stride > 1 else {}
        conv = CONVOLUTIONS[kind](4, 6, 3, stride, 1, groups=groups, bias=False, **further)  # type: ignore[arg-type]
        x = torch.randn(32, 4, *SIZES[axes])
        answers = conv(x).detach()
        answers = answers + 0.5 * torch.randn_like(answers)
        samples = take_samples(conv, Stop("", 1, lambda x=x, y=answers: iter([(x, y, None)])), groups)
        moments = Moments.of(samples).towards(samples, samples.targets()).uncentred()
        nothing = grouped(conv.weight.detach() * 0, groups, transposed)
        best = torch.stack(
            [each.best for each in quadratics(nothing, moments, Metric.of(moments, (3,) * axes, 1e-9))]
        )
        design = responses(conv, x, groups).double().detach()
        wanted = answers.transpose(0, 1).reshape(groups, 6 // groups, -1).double()
        oracle = torch.linalg.lstsq(design.mT, wanted.mT).solution.mT
        torch.testing.assert_close(best.flatten(2), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_whole_video_network_is_exact() -> None:
    """R(2+1)D-18: 37 kernels of three axes, flat ones and three of one position, 31 M parameters."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model, x = torchvision.models.video.r2plus1d_18().double().eval(), torch.randn(1, 3, 4, 16, 16).double()
    known = convsplit.study(model, x, forms=("dw-pw", "pw-dw", "pw-pw"))
    exact = known.convert(exact=True)
    assert sum(isinstance(layer, SeparableConv) for layer in exact.modules()) == 37
    with torch.no_grad():
        torch.testing.assert_close(exact(x), model(x), rtol=1e-9, atol=1e-9)


def test_kinds_live_together_in_one_model() -> None:
    """A spectrogram's way: sounds, images, volumes, and back; channels-last layouts are for images alone."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sound, self.image = nn.Conv1d(8, 16, 5, padding=2), nn.Conv2d(1, 8, 3, padding=1)
            self.volume, self.up = nn.Conv3d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            image = self.image(self.sound(x).unsqueeze(1))
            return self.up(image + self.volume(image.unsqueeze(2)).squeeze(2))

    model, x = Mixed().eval(), torch.randn(2, 8, 12)
    converted = convsplit.convert(model, x, exact=True)
    split = [module for module in converted.children() if isinstance(module, SeparableConv)]
    assert [axes_of(layer.merged()) for layer in split] == [1, 2, 3, 2]
    torch.testing.assert_close(converted(x), model(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(convsplit.for_inference(converted, x)(x), model(x), rtol=1e-3, atol=1e-4)
