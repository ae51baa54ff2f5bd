"""On a CUDA device everything works as on the CPU, stays on the device, and gives the same answers.

Skipped where there is none. cuDNN rounds the inputs of convolutions to TF32 by default; what is compared here is not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import AWKWARD, Awkward
from models import UNet
from residual import SmallNet, Untraceable, images, small_net
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import convsplit
from convsplit import Budget, SeparableConv, Stopwatch
from convsplit.cli import main
from convsplit.lowrank import cp, slice_svd
from convsplit.model.running import call
from convsplit.repair import recalibrate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def batches(count: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [images(16, dtype, seed=seed).to(CUDA) for seed in range(count)]


def there(model: nn.Module) -> bool:
    indices = [layer.channels for layer in model.modules() if isinstance(getattr(layer, "channels", None), Tensor)]
    return {t.device for t in (*model.parameters(), *model.buffers(), *indices)} == {CUDA}


def ranks(model: nn.Module) -> dict[str, tuple[str, int]]:
    return {name: (m.form, m.components) for name, m in model.named_modules() if isinstance(m, SeparableConv)}


def drift(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).norm() / model(x).norm())


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converts_as_on_the_cpu(dtype: torch.dtype, calibrated: bool) -> None:
    model, x = small_net(dtype=dtype), images(64, dtype, seed=9)
    given = batches(dtype=dtype)
    here = convsplit.convert(
        model, x, budget=Budget(params=0.5), calibration=[each.cpu() for each in given] if calibrated else None
    )
    model, x = copy.deepcopy(model).to(CUDA), x.to(CUDA)
    before = torch.cuda.get_rng_state()
    converted = convsplit.convert(model, x, budget=Budget(params=0.5), calibration=given if calibrated else None)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert there(converted)
    if not calibrated or dtype == torch.float64:  # else layers that cost the same change places by rounding
        assert ranks(converted) == ranks(here)
    assert drift(model, converted, x) == pytest.approx(drift(model, here.to(CUDA), x), rel=0.05)


@pytest.mark.filterwarnings("ignore::convsplit.ConversionWarning")
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models_convert_exactly(name: str) -> None:
    case: Awkward = AWKWARD[name]
    torch.manual_seed(0)
    model, inputs = case.build()
    try:
        model, inputs = model.to(CUDA), tree_map_only(Tensor, lambda t: t.to(CUDA), inputs)
        expected = outputs(model, inputs)
    except Exception as error:
        pytest.skip(f"does not run on CUDA: {error}")
    converted = convsplit.convert(model, inputs, exact=True, bake=case.bake)
    assert ranks(converted).keys() - ranks(model).keys() == set(case.split)
    for one, other in zip(outputs(converted, inputs), expected, strict=True):
        assert one.device == other.device
        assert (one - other).abs().max() <= max(case.tolerance, 1e-8) * other.abs().max()


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [torch.as_tensor(leaf) for leaf in tree_leaves(call(model, inputs))]


@pytest.mark.parametrize("channels", [16, 160])  # fitted on the CPU, and on the device
def test_factors_come_back_to_where_kernels_are(channels: int) -> None:
    weight = torch.randn(1, channels, channels, 9, generator=torch.Generator().manual_seed(0)).to(CUDA)
    start = cp(weight, channels // 2, iterations=2)
    fit, other = (cp(each, channels, start=start.to(each.device), iterations=5) for each in (weight, weight.cpu()))
    assert {factor.device for factor in (fit.A, fit.B, fit.C)} == {CUDA}
    assert fit.error == pytest.approx(other.error, rel=1e-3)
    svd = slice_svd(weight)
    assert (svd.left * svd.values.unsqueeze(-2) @ svd.right - weight).norm() < 1e-4 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = small_net(dtype=dtype).to(CUDA)
    converted = convsplit.convert(model, budget=Budget(params=0.6), calibration=batches(dtype=dtype))
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert ranks(converted)
    assert drift(model, converted, images(64, dtype, seed=9).to(CUDA)) < 0.2


def test_models_that_are_not_traced() -> None:
    model = small_net(Untraceable).to(CUDA)
    converted = convsplit.convert(model, budget=Budget(params=0.5), calibration=batches())
    plain = convsplit.convert(small_net().to(CUDA), budget=Budget(params=0.5), calibration=batches())
    x = images(64, seed=9).to(CUDA)
    assert drift(model, converted, x) == pytest.approx(drift(model, plain, x), rel=0.3)


def test_inputs_on_the_cpu_are_told_where_to_go() -> None:
    model = small_net().to(CUDA)
    with pytest.raises(ValueError, match=r"The model is on cuda:0, the inputs on cpu.*to\('cuda:0'\)"):
        convsplit.convert(model, calibration=images(8))
    loader = [(images(16, seed=seed), torch.zeros(16)) for seed in range(3)]
    converted = convsplit.convert(
        model, calibration=loader, forward=lambda model, batch: model(batch[0].to(CUDA)), budget=Budget(params=0.5)
    )
    assert there(converted)
    assert convsplit.compare(converted, model, images(16).to(CUDA)).drift.relative < 1


def test_a_default_device_does_not_draw_the_work_over() -> None:
    model, given, held = small_net(), images(32), images(8)
    with CUDA:
        converted = convsplit.convert(model, given, budget=Budget(params=0.5), calibration=given)
        found = convsplit.study(model, calibration=given).search(Budget(agreement=0.7))
        convsplit.compare(converted, model, held)
    assert {p.device.type for p in (*converted.parameters(), *found.model.parameters())} == {"cpu"}


def test_faster_products_of_the_user_do_not_reach_the_factors() -> None:
    model, x = wide(), torch.randn(2, 64, 28, 28, device=CUDA)
    plain = convsplit.convert(model, budget=Budget(params=0.4))
    torch.set_float32_matmul_precision("high")
    try:
        converted = convsplit.convert(model, budget=Budget(params=0.4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert drift(plain, converted, x) < 1e-3


def test_every_repair() -> None:
    model, x = small_net().to(CUDA), images(64, seed=9).to(CUDA)
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    as_converted = drift(model, converted, x)
    convsplit.refit(converted, model, batches())
    refitted = drift(model, converted, x)
    assert refitted < as_converted
    recalibrate(converted, batches())
    convsplit.reconstruct(converted, model, batches(), steps=50, progress=False)
    convsplit.distill(converted, model, batches(), epochs=3, progress=False)
    assert there(converted)
    assert drift(model, converted, x) < as_converted


def test_quality_and_frontier() -> None:
    model = small_net().to(CUDA)
    known = convsplit.study(model, calibration=batches(8), progress=False)
    found = known.search(Budget(drift=0.2))
    assert found.met
    assert there(found.model)
    curve = known.frontier(batches(2), budgets=(0.7, 0.4))
    assert len(curve.points) == 2


def test_other_kinds_of_convolution() -> None:
    model = UNet().eval().to(CUDA)
    x = torch.randn(2, 3, 16, 16, device=CUDA)
    converted = convsplit.convert(model, x, exact=True, linear=True, forms=("dw-pw", "pw-dw"))
    assert len(ranks(converted)) > 6
    assert drift(model, converted, x) < 1e-4
    assert drift(converted, convsplit.merge(converted), x) < 1e-5


def test_saved_and_loaded_anywhere(tmp_path: Path) -> None:
    model, x = small_net().to(CUDA), images(8).to(CUDA)
    converted = convsplit.convert(model, budget=Budget(params=0.5))
    convsplit.save(converted, tmp_path / "small.safetensors")
    for skeleton in (SmallNet().to(CUDA), SmallNet()):
        loaded = convsplit.load(tmp_path / "small.safetensors", skeleton.eval(), device=CUDA)
        assert there(loaded)
        assert torch.equal(loaded(x), converted(x))
    here = convsplit.load(tmp_path / "small.safetensors", SmallNet().eval())
    assert (here(x.cpu()) - converted(x).cpu()).abs().max() < 1e-4
    assert drift(converted, copy.deepcopy(converted).cpu().to(CUDA), x) == 0


@pytest.mark.parametrize(("runtime", "file"), [("torch", "a.pt2"), ("onnxruntime", "a.onnx"), ("openvino", "a.xml")])
def test_exports(tmp_path: Path, runtime: str, file: str) -> None:
    for package in {"torch": (), "onnxruntime": ("onnxruntime", "onnxscript")}.get(runtime, (runtime,)):
        pytest.importorskip(package)
    converted = convsplit.convert(small_net().to(CUDA), budget=Budget(params=0.5))
    done = convsplit.export(converted, tmp_path / file, images(2).to(CUDA), runtime=runtime, dynamic=(0,))
    assert done.difference < 1e-3
    assert there(converted)


@pytest.mark.parametrize("runtime", ["torch", "torch.compile", "torch.amp", "torch.cuda_graph"])
def test_time_is_measured_on_the_device(runtime: str) -> None:
    model, x = wide(), torch.randn(8, 64, 28, 28, device=CUDA)
    stopwatch = Stopwatch(seconds=2.0, runtime=runtime)
    plan = convsplit.make_plan(model, x, budget=Budget(macs=1.0), prefer="speed", stopwatch=stopwatch)
    assert plan.conditions is not None
    assert plan.conditions.device == torch.cuda.get_device_name()
    assert plan.conditions.runtime == runtime
    converted = convsplit.convert(model, budget=Budget(params=0.4))
    report = convsplit.compare(converted, model, [x], time=True, runtime=runtime)
    assert torch.cuda.get_device_name() in report.text()


def test_bench() -> None:
    found = convsplit.bench(
        wide(), torch.randn(1, 64, 28, 28, device=CUDA), budgets=[Budget(macs=0.3)], batch_sizes=[1, 32], threads=[1],
        runtimes=["torch", "torch.cuda_graph"], prefer="accuracy", seconds=2.0, progress=False,
    )  # fmt: skip
    assert len(found.rows) == 8, found.notes
    assert all(row.milliseconds[0] > 0 for row in found.rows)


def test_compiled_and_under_autocast() -> None:
    model, x = wide(), torch.randn(2, 64, 28, 28, device=CUDA)
    converted = convsplit.convert(model, budget=Budget(params=0.4))
    with torch.no_grad():
        plain = converted(x)
        assert (torch.compile(converted)(x) - plain).abs().max() < 1e-3
        with torch.autocast("cuda", torch.bfloat16):
            assert (converted(x) - plain).norm() < 0.05 * plain.norm()
    with torch.autocast("cuda", torch.bfloat16):
        loss = converted(x).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in converted.parameters())


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, shape = str(tmp_path / "small.safetensors"), ["--input", "8x3x12x12", "--device", "cuda"]
    assert main(["convert", "residual:small_net", "--budget", "params=0.5", *shape, "--out", out]) == 0
    assert main(["report", "residual:small_net", out, *shape, "--time", "--runtime", "torch.cuda_graph"]) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    assert ranks(convsplit.load(out, SmallNet()))


def wide() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(128, 64, 3, padding=1)).eval().to(CUDA)
