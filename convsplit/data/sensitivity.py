"""How much the output of a model depends on the outputs of its layers: second moments of gradients, no labels.

For random directions v of the output, with g the gradient of <v, model(x)> by a layer's output y[O] at a position,

    F [O, O] = mean g g',    so that an error e of a layer moves the output by about sqrt(e' F e).

F is the metric of the Gauss-Newton matrix of the outputs (Martens, "New insights and perspectives on the natural
gradient method", 2020, 1412.1193, section 8), with one block per layer and positions taken together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convsplit.data.processes import all_reduced_each
from convsplit.model.copies import scratch_copy
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, call, tensors_in
from convsplit.spec import axes_of

IMAGES = 128  # more of them hardly change the moments
DRAWS = 2  # directions per batch


def measure_sensitivity(
    model: nn.Module,
    names: Iterable[str],
    batches: Sequence[Batch],
    forward: Forward | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """F [O, O] in float64, of mean eigenvalue 1, of each named layer; layers that no gradient reaches are left out.

    `model` is left as it is. A model whose output cannot be differentiated gives an empty dict.

    >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    >>> measure_sensitivity(model, ["0"], [torch.zeros(1, 3, 8, 8)])["0"].shape
    torch.Size([2, 2])
    """
    sums: dict[str, Tensor] = {}

    def add(taps: Taps, output: Any) -> None:
        for name, _, gradient in _gradients(taps, output, seed):
            g = gradient.movedim(-axes[name] - 1, 0).flatten(1).float()
            moment = (g @ g.mT).double()
            sums[name] = sums[name] + moment if name in sums else moment

    wanted = set(names)
    axes = {name: axes_of(model.get_submodule(name)) for name in wanted}
    if not _run(model, wanted, batches, forward, add):
        return {}
    moments = all_reduced_each(sums, sorted(wanted))
    return {name: F / F.diagonal().mean() for name, F in moments.items() if F.diagonal().mean() > 0}


def measure_gains(
    model: nn.Module, names: Iterable[str], batches: Sequence[Batch], forward: Forward | None = None, *, seed: int = 0
) -> dict[str, float]:
    """How far the model's output moves for errors in each layer's output, both relative and squared.

    With errors of independent signs and as large, relatively, at every place of the layer's output y and gradients g,

        |output moved|^2 = error^2 * sum (g y)^2,    so that    gain = sum (g y)^2 / |output|^2.

    Layers that no gradient reaches are left out; a model whose output cannot be differentiated gives an empty dict.

    >>> model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    >>> 0.7 < measure_gains(model, ["0"], [torch.ones(8, 3, 8, 8)])["0"] < 1.4  # about 1: it is the output
    True
    """
    moved: dict[str, float] = {}
    size = 0.0

    def add(taps: Taps, output: Any) -> None:
        nonlocal size
        size += sum(float(value.detach().double().square().sum()) for value in tensors_in(output))
        for name, y, gradient in _gradients(taps, output, seed):
            moved[name] = moved.get(name, 0.0) + float((gradient * y.detach()).double().square().sum()) / DRAWS

    if not _run(model, set(names), batches, forward, add) or not size:
        return {}
    return {name: value / size for name, value in moved.items()}


Taps = list[tuple[str, Tensor]]  # outputs of layers, in the order of their calls


def _run(
    model: nn.Module, names: set[str], batches: Sequence[Batch], forward: Forward | None,
    add: Callable[[Taps, Any], None],
) -> bool:  # fmt: skip
    """Run a copy on the first batches, and hand on what the layers and the model gave; False where that cannot be."""
    copied = scratch_copy(model)
    # Only gradients with respect to the layers' outputs are requested, so those of the weights are never computed; the
    # weights only have to make the outputs part of the graph. Detached: the user's flags and graphs are left alone.
    for module in copied.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and not is_lazy(parameter):
                wanted, values = parameter.is_floating_point(), parameter.detach()
                values = values.clone() if values.is_inference() else values  # those cannot be part of a graph
                module._parameters[key] = nn.Parameter(values, requires_grad=wanted)
    layers = {name: module for name, module in copied.named_modules() if name in names}
    taps: Taps = []

    def tap(name: str, given: Given, output: Any) -> Any:
        """Keep a layer's answer and hand on a copy, which later layers may change in place."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        taps.append((name, output))
        return output.clone()

    seen = 0
    try:
        with hooked(layers, after=tap), torch.enable_grad():
            for batch in batches:
                taps.clear()
                add(taps, (forward or call)(copied, batch))
                seen += taps[0][1].shape[0] if taps else 0
                if seen >= IMAGES:
                    break
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # something on the way has no derivative
        return False
    return True


def _gradients(taps: Taps, output: Any, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of each layer the output and, for some directions of the model's output, its gradient."""
    taps = list(taps)  # gradient checkpointing runs layers again in the backward pass, and their taps do not count
    outputs = [value for value in tensors_in(output) if value.requires_grad]
    if not outputs or not taps:
        return
    generator = torch.Generator().manual_seed(seed)
    for draw in range(DRAWS):
        directions = [torch.randn(value.shape, generator=generator, device="cpu").to(value) for value in outputs]
        # One number to differentiate: for directions as an argument, autograd would import sympy, which takes a second.
        along = [(value * direction).real.sum() for value, direction in zip(outputs, directions, strict=True)]
        gradients = torch.autograd.grad(
            along, [tap for _, tap in taps], retain_graph=draw + 1 < DRAWS, allow_unused=True
        )
        for (name, value), gradient in zip(taps, gradients, strict=True):
            if gradient is not None:
                yield name, value, gradient
