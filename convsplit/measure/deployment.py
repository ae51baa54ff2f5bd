"""for_inference: a model as it should be deployed: batch norm folded away, the fastest layout, nothing to train."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from convsplit.folding import folded
from convsplit.layers.separable import SeparableConv
from convsplit.measure.stopwatch import fastest_arrangement
from convsplit.measure.timing import time_models
from convsplit.model.copies import deep_copy, scratch_copy
from convsplit.model.guards import plain_arithmetic, same_globals
from convsplit.model.layout import in_channels_last
from convsplit.model.running import Batch, Forward, observe_calls

M = TypeVar("M", bound=nn.Module)

SECONDS = 2.0  # of timing each layout


@same_globals()
@plain_arithmetic()
def for_inference(model: M, example_inputs: Batch = None, *, forward: Forward | None = None) -> M:
    """A copy for inference: batch norm folded into the convolutions before it, and no parameter requires gradients.

    Each batch norm that directly follows a split layer or a convolution, and nothing else does, is taken into
    that layer's last stage and replaced by `nn.Identity`, or by the activation that it holds (timm's
    `BatchNormAct2d`); frozen norms of torchvision, timm and transformers are folded, too. Outputs stay the same up to
    rounding. Where torch.fx cannot trace the whole model, code that is not traced may look at what passes between
    the two: parts that are traced are then folded only with `example_inputs`, if outputs are seen to stay.

    Args:
        model: converted or not; it is not changed. It must have been trained: running statistics are what is folded.
        example_inputs: inputs of the size it will see. The contiguous and the channels-last layout are then measured,
            and the ways in which split layers can run, and the fastest are kept. Without them nothing is measured,
            the layout stays, and only what the trace of a whole model covers is folded.
        forward: how to run the model on `example_inputs`.

    Returns:
        a module of the model's own class, in eval mode.

    Raises:
        TypeError: the model cannot be deep-copied.
        ValueError: the model does not run on the example inputs.

    Source: Jacob et al., "Quantization and training of neural networks", 2018 (1712.05877), section 3.2, for the
    folding.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()).eval()
    >>> deployed = for_inference(convsplit.convert(model))
    >>> deployed[1]
    Identity()
    >>> type(deployed[0]).__name__, any(p.requires_grad for p in deployed.parameters())
    ('SeparableConv2d', False)
    """
    copied = folded(model, example_inputs, forward)
    if example_inputs is not None:
        _arrange(copied, example_inputs, forward)
        copied = _in_fastest_layout(copied, example_inputs, forward)
    return copied  # type: ignore[return-value]


def _arrange(model: nn.Module, example_inputs: Batch, forward: Forward | None) -> None:
    """Give each split layer the arrangement that is measured fastest at the shapes it sees."""
    calls, _ = observe_calls(scratch_copy(model), example_inputs, forward)
    for name, layer in model.named_modules():
        if isinstance(layer, SeparableConv) and name in calls:
            layer.arrangement = fastest_arrangement(layer, [use.input_shape for use in calls[name]])


def _in_fastest_layout(model: nn.Module, example_inputs: Any, forward: Forward | None) -> nn.Module:
    candidates = [deep_copy(model).to(memory_format=torch.contiguous_format), in_channels_last(deep_copy(model))]
    times = time_models([scratch_copy(each) for each in candidates], example_inputs, forward=forward, seconds=SECONDS)
    return min(zip(candidates, times, strict=True), key=lambda pair: pair[1].total)[0]
