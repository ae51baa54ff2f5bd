"""Guards: what is global is afterwards what it was before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """The states of every generator that models draw from without being given one."""

    python: Any
    numpy: Any
    torch: tuple[Tensor, ...]  # the CPU's, then that of each CUDA device

    @classmethod
    def now(cls) -> RandomState:
        """The present states."""
        # Asking for the state of a device would start CUDA where nobody uses it.
        started = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = torch.cuda.get_rng_state_all() if started else []
        return cls(random.getstate(), np.random.get_state(), (torch.get_rng_state(), *devices))

    def restore(self) -> None:
        """Go on from these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch[0])
        if len(self.torch) > 1:
            torch.cuda.set_rng_state_all(list(self.torch[1:]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomState):
            return NotImplemented
        numpy = all(np.array_equal(one, another) for one, another in zip(self.numpy, other.numpy, strict=True))
        devices = zip(self.torch, other.torch, strict=False)  # CUDA may have started in between
        return numpy and self.python == other.python and all(torch.equal(one, another) for one, another in devices)

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def same_globals() -> Iterator[None]:
    """Random states, default dtype, gradient mode and number of threads are afterwards what they were before."""
    states, dtype = RandomState.now(), torch.get_default_dtype()
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        yield
    finally:
        states.restore()
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Neither autocast nor inference mode, which would round factors and leave parameters that cannot be trained."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))  # which also turns gradients on
            modes.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield
