"""Operations counted while a model runs, by torch's own formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry


def flops_of(run: Callable[[], object]) -> int:
    """Operations of a run as `FlopCounterMode` counts them, two for each multiplication with its addition.

    That mode keeps the compiler out, for which it imports all of it: 2 s for a model that runs in milliseconds. It is
    left with those that need the compiler themselves, as `torch.cond` does; they are run once more.

    >>> import torch
    >>> flops_of(lambda: torch.zeros(2, 3) @ torch.zeros(3, 4))
    48
    """
    if not _compiler_is_here():
        try:
            with _Count() as counted:
                run()
            return int(counted.flops)
        except Exception:
            if not _compiler_is_here():
                raise
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _compiler_is_here() -> bool:
    return "torch._dynamo" in sys.modules


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the operations of every call that has a formula, or of what others are made of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                output = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if output is NotImplemented else output
        output = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=output)
        return output
