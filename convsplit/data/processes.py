"""Several processes, each with its own share of the inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed


def all_reduced(part: Tensor, operation: str = "SUM") -> Tensor:
    """The sum (or "MAX") over all processes, where several share the work."""
    if not is_shared():
        return part
    reached = part.to("cuda") if distributed.get_backend() == "nccl" else part.contiguous()  # which takes no others
    distributed.all_reduce(reached, getattr(distributed.ReduceOp, operation))
    return reached.to(part.device)


def is_shared() -> bool:
    """Whether several processes work together, each on its own share of inputs."""
    return distributed.is_available() and distributed.is_initialized()


def reduced_numbers(*numbers: float, operation: str = "SUM") -> list[float]:
    """Plain numbers over all processes, on the CPU whatever the user's default device is."""
    return all_reduced(torch.tensor(numbers, dtype=torch.float64, device="cpu"), operation).tolist()


def all_reduced_each(parts: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The sums [n, n] or [G, n, n] of each name over all processes, in two messages; one may lack what others have."""
    names = list(names)
    if not is_shared():
        return {name: parts[name] for name in names if name in parts}
    shapes = torch.zeros(len(names), 3, dtype=torch.int64, device="cpu")
    for shape, name in zip(shapes, names, strict=True):
        if name in parts:
            shape[3 - parts[name].dim() :] = torch.tensor(parts[name].shape, device="cpu")
    shapes = all_reduced(shapes, "MAX")
    sizes = [[int(side) for side in shape if side] for shape in shapes]
    found = {name: size for name, size in zip(names, sizes, strict=True) if size}
    if not found:
        return {}
    device = next((part.device for part in parts.values()), torch.device("cpu"))
    held = [
        parts[n].flatten() if n in parts else torch.zeros(math.prod(size), device="cpu") for n, size in found.items()
    ]
    flat = all_reduced(torch.cat([part.to(device, torch.float64) for part in held]))
    totals = torch.split(flat, [len(part) for part in held])
    return {name: total.reshape(size) for (name, size), total in zip(found.items(), totals, strict=True)}


def is_over(began: float, seconds: float | None) -> bool:
    """Whether so many seconds have passed since `began` (of `time.monotonic`), in any process."""
    if seconds is None:
        return False
    return bool(reduced_numbers(time.monotonic() - began > seconds, operation="MAX")[0])
