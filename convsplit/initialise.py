"""Initialising split layers: the best factors of their original kernels, in the metric of their inputs where known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from convsplit.data.moments import Assumed, Marginals, whitened
from convsplit.forms import CP, Factors, form_named, grouped
from convsplit.layers.separable import SeparableConv
from convsplit.lowrank import ends_early
from convsplit.precision import widened
from convsplit.spec import Convolution


@torch.no_grad()
def initialise_each(
    layers: Sequence[SeparableConv],
    convs: Sequence[Convolution],
    *,
    fits: Sequence[Sequence[CP]],
    marginals: Sequence[Marginals | Assumed | None],
    seed: int = 0,
) -> None:
    """Fill layers of one form and kernel shape with factors of the weights of `convs`, and copy the biases.

    Factors are fitted in a metric that takes the mean of the inputs off. Where it was measured, the bias makes good
    what they make of it, so that outputs keep their mean; layers without bias get one.

    `fits` of each come from its error curve, in the metric of its `marginals`. CP starts there in a measured metric,
    and where it has few sweeps. Without one, small kernels converge from singular vectors too: the errors are as small,
    but outputs of a trained network drift less (benchmarks/results/accuracy.md).

    Raises:
        ValueError: a weight holds NaN or infinite values.
    """
    form = form_named(layers[0].form)
    kernels = []
    for layer, conv, known in zip(layers, convs, marginals, strict=True):
        if not conv.weight.isfinite().all():
            raise ValueError(f"the weight of {conv} holds NaN or infinite values and cannot be factorised")
        # float32 at least: half precision has no linear algebra, and its rounding would enter the factors twice.
        kernel = grouped(widened(conv.weight.detach()), layer.groups, layer.transposed).contiguous()
        if known is not None:
            kernel = whitened(kernel, *known.roots(mix_channels=form.expands)).to(kernel.dtype)
        kernels.append(kernel)
    starts = [
        own if isinstance(known, Marginals) or ends_early(kernel.shape, layer.components // layer.groups) else ()
        for own, known, kernel, layer in zip(fits, marginals, kernels, layers, strict=True)
    ]
    found = form.factorise_each(
        kernels, [layer.components for layer in layers], even=[layer.even for layer in layers], seed=seed, fits=starts
    )
    for layer, conv, factors, known in zip(layers, convs, found, marginals, strict=True):
        layer.load_factors(factors if known is None else unwhitened(factors, known, mix_channels=form.expands))
        if layer.bias is not None and conv.bias is not None:
            layer.bias.copy_(conv.bias)
        if isinstance(known, Marginals) and known.means is not None:
            _keep_means(layer, conv, known.means)


def _keep_means(layer: SeparableConv, conv: Convolution, means: Tensor) -> None:
    """Shift the bias by what is missing of the kernel [G, O, I, K], applied to the mean input [G, I, K]."""
    whole, fitted = (grouped(each.weight.detach().double(), layer.groups, layer.transposed) for each in (conv, layer))
    missing = ((whole - fitted) * means.unsqueeze(1)).sum((2, 3)).flatten()
    if missing.abs().max() > 0:
        bias = layer.add_bias()
        bias.add_(missing.to(bias))


def unwhitened(factors: Factors, marginals: Marginals | Assumed, *, mix_channels: bool) -> Factors:
    """Factors of a kernel W from those of `whitened` W: the roots are undone in the stages that meet the inputs.

    Where each component reads one input channel the root of the channels is diagonal, and its number for that channel
    is taken out of the component.
    """
    channels, positions = marginals.roots(mix_channels=mix_channels)
    spatial = factors.spatial @ positions.inverse.to(factors.spatial)
    if channels is None:
        return replace(factors, spatial=spatial).balanced()
    if factors.inputs is not None:
        inputs = factors.inputs @ channels.inverse.to(factors.inputs)
        return replace(factors, spatial=spatial, inputs=inputs).balanced()
    assert factors.channels is not None
    own: Tensor = channels.inverse.diagonal(dim1=1, dim2=2).gather(1, factors.channels)
    return replace(factors, spatial=spatial * own.unsqueeze(2).to(spatial)).balanced()
