"""Models and the paths out of eager PyTorch that a converted one must be able to take.

The tests run every pair, and benchmarks/suites/export_matrix.py prints the same pairs as a table. A path is a function
`(model, args)` that takes the path and raises where the result differs from the model's own. To add a model or a
path, add a function under its decorator.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torchvision
from models import UNet, awakened, small_net
from torch import Tensor, nn
from torch.export import Dim

import convsplit
from convsplit.model.running import tensors_in

Args = tuple[Any, ...]
Path = Callable[[nn.Module, Args], None]

BUILDERS: dict[str, Callable[[], nn.Module]] = {}
PATHS: dict[str, Path] = {}


def builder(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    BUILDERS[build.__name__] = build
    return build


def path(take: Path) -> Path:
    PATHS[take.__name__] = take
    return take


# Models


@builder
def small() -> nn.Module:
    """Strided, dilated, grouped and reflecting convolutions in a few layers."""
    return small_net()


@builder
def resnet18() -> nn.Module:
    return torchvision.models.resnet18()


@builder
def mobilenet_v3_small() -> nn.Module:
    return torchvision.models.mobilenet_v3_small()


@builder
def unet() -> nn.Module:
    return UNet()


@builder
def timm_resnet10t() -> nn.Module:
    import timm

    return timm.create_model("resnet10t", pretrained=False)


@builder
def fcos() -> nn.Module:
    """A detector as it is: lists of images in, boxes after non-maximum suppression out."""
    model = torchvision.models.detection.fcos_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64, detections_per_img=5, num_classes=4
    )
    model.score_thresh = 0.0
    return model


@builder
def fcos_features() -> nn.Module:
    """The part of the detector that holds nearly all convolutions: residual network and feature pyramid."""
    return fcos().backbone


@cache
def dense(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return awakened(BUILDERS[name]()).eval()


@cache
def converted(name: str) -> nn.Module:
    """The U-Net shows the form that is slowest to fit, the others the two with uneven shares of components."""
    if name == "unet":
        return convsplit.convert(dense(name), forms="pw-dw-pw", rank=4)
    return convsplit.convert(dense(name), forms=("dw-pw", "pw-dw"), budget=convsplit.Budget(params=0.5))


def args_for(name: str, batch: int = 2, size: int = 64) -> Args:
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    return (list(images.sigmoid()),) if name == "fcos" else (images,)


def outputs(model: Any, args: Args) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors_in(model(*args)))


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to a tolerance relative to the largest value of each output."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max()) if other.numel() else 1.0
        torch.testing.assert_close(one.to(other.dtype), other, rtol=0, atol=tolerance * max(scale, 1.0))


# Compiling C++ for these takes minutes; torch_compile_fullgraph covers all but the generated code.
NOT_RUN = {
    (name, "torch_compile") for name in ("resnet18", "mobilenet_v3_small", "timm_resnet10t", "fcos", "fcos_features")
}
# A detector takes lists of images, which have no batch dimension.
NOT_RUN |= {("fcos", "torch_export_dynamic_batch"), ("fcos", "onnx_dynamic_batch"), ("fcos", "for_inference_onnx")}


# Paths


@path
def torch_export(model: nn.Module, args: Args) -> None:
    program = torch.export.export(model, args)
    assert_equal(outputs(program.module(), args), outputs(model, args))


@path
def torch_export_dynamic_batch(model: nn.Module, args: Args) -> None:
    program = torch.export.export(model, args, dynamic_shapes=[{0: Dim("batch", min=2, max=64)}])
    more = (torch.cat([args[0], args[0], args[0]]),)
    assert_equal(outputs(program.module(), more), outputs(model, more))


@path
def torch_export_saved(model: nn.Module, args: Args) -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, args), file)
    file.seek(0)
    assert_equal(outputs(torch.export.load(file).module(), args), outputs(model, args))


@path
def torch_compile(model: nn.Module, args: Args) -> None:
    torch._dynamo.reset()
    assert_equal(outputs(torch.compile(model), args), outputs(model, args))


@path
def torch_compile_fullgraph(model: nn.Module, args: Args) -> None:
    torch._dynamo.reset()
    assert_equal(outputs(torch.compile(model, fullgraph=True, backend="aot_eager"), args), outputs(model, args))


@path
def onnx(model: nn.Module, args: Args) -> None:
    _run_onnx(model, args, args)


@path
def onnx_dynamic_batch(model: nn.Module, args: Args) -> None:
    more = (torch.cat([args[0], args[0], args[0]]),)
    _run_onnx(model, args, more, dynamic_shapes=[{0: Dim("batch", min=2, max=64)}])


def _run_onnx(model: nn.Module, args: Args, check: Args, **export: Any) -> None:
    import onnxruntime

    file = io.BytesIO()
    program = torch.onnx.export(model, args, dynamo=True, verbose=False, **export)
    program.save(file)
    options = onnxruntime.SessionOptions()
    # With two threads on busy cores onnxruntime 1.32 now and then is off by 1 %, in repeated runs of one session.
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {node.name: t.numpy() for node, t in zip(session.get_inputs(), tensors_in(check), strict=True)}
    assert_equal([torch.from_numpy(array) for array in session.run(None, feed)], outputs(model, check))


@path
def jit_trace(model: nn.Module, args: Args) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, args, strict=False, check_trace=False)
    assert_equal(outputs(traced, args), outputs(model, args))


@path
def fx_trace(model: nn.Module, args: Args) -> None:
    assert_equal(outputs(torch.fx.symbolic_trace(model), args), outputs(model, args))


@path
def quantize_fx_graph_mode(model: nn.Module, args: Args) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), args)
        outputs(prepared, args)
        quantised = convert_fx(prepared)
    _assert_quantised_close(quantised, model, args)
    left = [name for name, module in quantised.named_modules() if type(module) is nn.Conv2d]
    assert not left, f"still in floating point: {left}"  # stages must be quantised too


@path
def quantize_pt2e(model: nn.Module, args: Args) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, args).module(), quantizer)
    outputs(prepared, args)
    _assert_quantised_close(convert_pt2e(prepared), model, args)


def _assert_quantised_close(quantised: nn.Module, model: nn.Module, args: Args) -> None:
    """Eight bits with random weights and two calibration images: the same direction, not the same numbers."""
    for one, other in zip(outputs(quantised, args), outputs(model, args), strict=True):
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert cosine > 0.9, f"cosine similarity {cosine:.3f}"


@path
def autocast_bfloat16(model: nn.Module, args: Args) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(model, args)
    assert_equal([t.float() for t in found], [t.float() for t in outputs(model, args)], 0.1)


@path
def channels_last(model: nn.Module, args: Args) -> None:
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = args[0].to(memory_format=torch.channels_last) if isinstance(args[0], Tensor) else args[0]
    assert_equal(outputs(moved, (images,)), outputs(model, args))


@path
def merged(model: nn.Module, args: Args) -> None:
    assert_equal(outputs(convsplit.merge(model), args), outputs(model, args))


@path
def for_inference(model: nn.Module, args: Args) -> None:
    deployed = convsplit.for_inference(model)
    assert_equal(outputs(deployed, args), outputs(model, args))


@path
def for_inference_torch_export(model: nn.Module, args: Args) -> None:
    torch_export(convsplit.for_inference(model), args)


@path
def for_inference_onnx(model: nn.Module, args: Args) -> None:
    onnx(convsplit.for_inference(model), args)


@path
def for_inference_jit_trace(model: nn.Module, args: Args) -> None:
    jit_trace(convsplit.for_inference(model), args)


def attempt(model: nn.Module, take: str, args: Args) -> str:
    """Empty where the path works, else the first line of the reason."""
    try:
        PATHS[take](model, args)
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {text}"
    return ""
