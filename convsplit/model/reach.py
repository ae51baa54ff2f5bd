"""Reach: whether a converted model runs its layers as often as the original ran theirs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from convsplit.layers.separable import SeparableConv
from convsplit.model.copies import deep_copy
from convsplit.model.running import Batch, Forward, quiet_run, run_or_explain


def unused_layers(
    original: nn.Module, converted: nn.Module, example_inputs: Batch, forward: Forward | None = None
) -> dict[str, tuple[int, int]]:
    """Split layers that run less often than the layers they replace, with the calls of both models.

    Both models run once on the same inputs, as copies. A layer is missed where code picks layers by
    `isinstance(layer, nn.Conv2d)`, or where a function or a wrapped `forward` holds on to the original's modules.

    Raises:
        ValueError: a model does not run on the inputs; names the module that failed.

    >>> import torch, convsplit
    >>> class Picky(nn.Sequential):
    ...     def forward(self, x):
    ...         return self[0](x) if isinstance(self[0], nn.Conv2d) else x
    >>> model = Picky(nn.Conv2d(8, 8, 3))
    >>> unused_layers(model, convsplit.convert(model), torch.zeros(1, 8, 5, 5))
    {'0': (1, 0)}
    """
    layers = [name for name, module in converted.named_modules() if isinstance(module, SeparableConv)]
    before, after = (_calls(model, layers, example_inputs, forward) for model in (original, converted))
    return {name: (before[name], after[name]) for name in layers if after[name] < before[name]}


def _calls(model: nn.Module, names: list[str], example_inputs: Batch, forward: Forward | None) -> Counter[str]:
    """How often the forward of each module is run, also where it is called without its hooks."""
    copied, calls = deep_copy(model), Counter[str]()

    def counted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def inner(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return run(*args, **kwargs)

        return inner

    modules = dict(copied.named_modules(remove_duplicate=False))
    for name in names:
        if name in modules:
            module: Any = modules[name]
            module.forward = counted(name, module.forward)
    # A wrapped forward may be bound to the model that was copied, and calls that one's layers.
    own = {id(module): name for name, module in model.named_modules() if name in names}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in own:
            calls[own[id(module)]] += 1

    handle = register_module_forward_hook(note)
    try:
        with quiet_run(copied):
            run_or_explain(copied, example_inputs, forward)
    finally:
        handle.remove()
    return calls
