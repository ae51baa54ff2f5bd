"""PyTorch itself: as it is, compiled, and on CUDA in mixed precision or as one graph that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.model.running import Batch, Forward, call, device_of
from convsplit.runtimes.base import Run, Runtime, clock_of_cpu

WARM_UP = 3  # runs before a CUDA graph is recorded: libraries choose kernels and reserve memory meanwhile


@dataclass(frozen=True)
class Torch(Runtime):
    """Eager PyTorch, or compiled, under autocast, as a CUDA graph."""

    needs: tuple[str, ...] = ("torch",)
    compiled: bool = False
    autocast: bool = False
    graphs: bool = False

    def precision(self, dtype: torch.dtype) -> str:
        """The parameters' dtype; with autocast also that of the arithmetic."""
        own = super().precision(dtype)
        return f"{own} with autocast" if self.autocast else own

    def clock(self, device: torch.device) -> Callable[[], float]:
        """Time of work on one CPU thread, else the time that passes."""
        return clock_of_cpu(device) or super().clock(device)

    def prepare(self, model: nn.Module, batch: Batch, forward: Forward | None = None) -> Run:
        """Compile or record where asked to.

        Raises:
            ValueError: a CUDA graph of a model that is not on a CUDA device.
        """
        run = forward or call
        ready: Any = torch.compile(model) if self.compiled else model
        device = device_of(model, batch)

        def plain() -> None:
            with torch.no_grad():
                run(ready, batch)

        def mixed() -> None:
            with torch.autocast(device.type):
                plain()

        once = mixed if self.autocast else plain

        if self.compiled:
            once()
        return _recorded(once, device) if self.graphs else once

    def prepare_layer(self, layer: nn.Module, x: Tensor) -> Run:
        """As for models, but not compiled: that takes seconds, and convolutions are the same library calls then."""
        return replace(self, compiled=False).prepare(layer, x)


def _recorded(run: Callable[[], Any], device: torch.device) -> Run:
    """One replay of the run as a CUDA graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs)."""
    if device.type != "cuda":
        raise ValueError(f"runtime 'torch.cuda_graph' is for CUDA; the model is on {device}")
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: graph.replay()
