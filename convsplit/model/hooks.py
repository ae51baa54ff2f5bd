"""Hooks that watch modules at work, and are always taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from convsplit.model.values import tensors_in


@dataclass(frozen=True)
class Given:
    """What a module is called with, by position and by keyword: `conv(x)` and `conv(input=x)` alike."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensor(self) -> Tensor | None:
        """The first tensor in it: what a layer works on."""
        return next(tensors_in((self.args, self.kwargs)), None)


Before = Callable[[str, Given], Any]
After = Callable[[str, Given, Any], Any]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], *, before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call `before(name, given)` and `after(name, given, output)` around every call of the modules, while inside.

    What `after` returns replaces the output, unless it is None. Scripted modules take no such hooks, and are left out.

    Raises:
        TypeError: a module is called inside torch.vmap, where nothing can be told of the values.
    """

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if before is not None:
                before(name, Given(args, kwargs))

        return hook

    def leaving(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if after is not None and any(map(is_batchedtensor, tensors_in((args, kwargs)))):
                raise TypeError(
                    f"{name} is called inside torch.vmap, where its inputs cannot be looked at: give forward= that "
                    "calls the model without it"
                )
            return None if after is None else after(name, Given(args, kwargs), output)

        return hook

    handles = []
    try:
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if before is not None:
                handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(leaving(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
