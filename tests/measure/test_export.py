"""Every model takes every path out of eager PyTorch that it took before the conversion.

The pairs live in export_paths.py; `python -m benchmarks export_matrix` prints them as a table.
"""

from __future__ import annotations

import export_paths as paths
import pytest
import torch
from torch import nn

from convsplit import SeparableConv2d

# Where the model fails in the same way before the conversion: torch's limits, not the split layers'.
FAILS_DENSE = {
    ("small", "quantize_fx_graph_mode"): "torch: quantised Conv2d with padding='same' and reflection",
    ("resnet18", "quantize_pt2e"): "torchao: the x86 quantiser refuses the residual additions",
    ("fcos_features", "quantize_pt2e"): "torchao: the x86 quantiser refuses the residual additions",
    ("fcos", "torch_export"): "torchvision: sizes depend on the boxes found",
    ("fcos", "torch_export_saved"): "torchvision: sizes depend on the boxes found",
    ("fcos", "torch_compile_fullgraph"): "torchvision: sizes depend on the boxes found",
    ("fcos", "onnx"): "torchvision: sizes depend on the boxes found",
    ("fcos", "for_inference_torch_export"): "torchvision: sizes depend on the boxes found",
    ("fcos", "for_inference_jit_trace"): "torch: traced functions return tensors only",
    ("fcos", "jit_trace"): "torch: traced functions return tensors only",
    ("fcos", "fx_trace"): "torch: control flow over images",
    ("fcos", "quantize_fx_graph_mode"): "torch: control flow over images",
    ("fcos", "quantize_pt2e"): "torchvision: sizes depend on the boxes found",
    ("fcos", "autocast_bfloat16"): "other boxes survive when scores are rounded",
}
# A few seconds each on one core, so they run on every change; the others run in CI.
QUICK_PATHS = (
    "torch_export",
    "torch_export_dynamic_batch",
    "fx_trace",
    "autocast_bfloat16",
    "channels_last",
    "merged",
    "for_inference",
)
QUICK = {("small", path) for path in (*QUICK_PATHS, "jit_trace", "torch_compile_fullgraph")}
QUICK |= {(name, path) for name in ("unet", "resnet18") for path in QUICK_PATHS[2:]}


def pairs() -> list[object]:
    return [
        pytest.param(name, path, marks=[] if (name, path) in QUICK else [pytest.mark.slow])
        for name in paths.BUILDERS
        for path in paths.PATHS
        if (name, path) not in paths.NOT_RUN
    ]


@pytest.mark.parametrize(("name", "path"), pairs())
def test_path(name: str, path: str) -> None:
    if (name, path) in FAILS_DENSE:
        pytest.xfail(FAILS_DENSE[name, path])
    paths.PATHS[path](paths.converted(name), paths.args_for(name))


@pytest.mark.slow
def test_every_model_has_split_layers() -> None:
    for name in paths.BUILDERS:
        assert any(isinstance(module, SeparableConv2d) for module in paths.converted(name).modules()), name


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw"])
@pytest.mark.parametrize(
    "path", ["torch_export", "torch_compile_fullgraph", "jit_trace", "fx_trace", "channels_last"]
)
def test_layers_with_unequal_multiplicities(form: str, path: str) -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(8, 12, 3, padding=1, form=form, components=17).eval()
    assert not layer.even
    paths.PATHS[path](nn.Sequential(layer, nn.ReLU()), (torch.randn(2, 8, 9, 9),))
