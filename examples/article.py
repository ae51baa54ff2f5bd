"""A standard convolution beside its depthwise, pointwise and depthwise-separable counterparts.

    python examples/article.py [--in-channels 64] [--out-channels 128] [--kernel 3] [--size 56]

The arithmetic behind MobileNet (Howard et al., 2017, section 3.1): a K x K convolution costs I·O·K² parameters, its
depthwise part I·K², its pointwise part I·O, and both together 1/O + 1/K² of the standard one. Printed for both
orders, with what the counters of PyTorch measure beside the formulas.
"""

import argparse

import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convsplit
from convsplit.tables import Table, count, ratio


def measure(layer: nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """Parameters as stored and MACs as counted while running."""
    with FlopCounterMode(display=False) as counter:
        layer(image)
    return sum(p.numel() for p in layer.parameters()), counter.get_total_flops() // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-channels", type=int, default=64)
    parser.add_argument("--out-channels", type=int, default=128)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--size", type=int, default=56)
    arguments = parser.parse_args()
    I, O, k = arguments.in_channels, arguments.out_channels, arguments.kernel
    image = torch.randn(1, I, arguments.size, arguments.size)
    same = {"padding": "same", "bias": False}

    def separable(form: str) -> nn.Module:
        return convsplit.SeparableConv2d(I, O, k, form=form, rank=1, **same)

    layers = {
        "standard": (nn.Conv2d(I, O, k, **same), "I·O·K²"),
        "depthwise": (nn.Conv2d(I, I, k, groups=I, **same), "I·K²"),
        "pointwise": (nn.Conv2d(I, O, 1, **same), "I·O"),
        "depthwise-separable, MobileNet order (dw-pw)": (separable("dw-pw"), "I·K² + I·O"),
        "depthwise-separable, Xception order (pw-dw)": (separable("pw-dw"), "I·O + O·K²"),
    }
    standard = measure(layers["standard"][0], image)
    rows = []
    for name, (layer, formula) in layers.items():
        params, macs = measure(layer, image)
        rows.append([name, formula, count(params), count(macs), ratio(params, standard[0]), ratio(macs, standard[1])])
    headings = ["layer", "formula", "parameters", "MACs", "of the standard's", "and MACs"]
    console = Console(width=130)
    console.print(f"{I} -> {O} channels, {k} x {k} kernel, {arguments.size} x {arguments.size} pixels")
    console.print(Table(headings, rows, frozenset({"layer", "formula"})).rich())
    console.print(f"1/O + 1/K² = {100 * (1 / O + 1 / k**2):.1f} %: what dw-pw keeps of the MACs")


if __name__ == "__main__":
    main()
