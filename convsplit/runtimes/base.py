"""What a runtime is: a name, what it needs installed, and how a model and its inputs become a callable that runs once.

Timing, budgets and benches know no more of a runtime than this, so another one is another subclass, or merely a
function (`Custom`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from convsplit.model.running import Batch, Forward

# Runs a model once. What measures time itself (a device at the other end of a network) returns milliseconds, a float.
Run = Callable[[], float | None]
Prepare = Callable[[nn.Module, Batch], Run]


@dataclass(frozen=True)
class Runtime:
    """Somewhere that models run. `needs` are the packages without which it does not, the first gives its version.

    `block` divides the widths that it runs well, `arrangements` are those of split layers that make a difference
    in it, `layout` and `device` are its own where they are not the model's choice. A run of `prepare_layer` runs the
    layer `copies` times. `inside` says that layers can be timed within a model, by hooks. `extra` installs what it
    needs.
    """

    name: str = ""
    needs: tuple[str, ...] = ()
    extra: str = ""
    block: int = 1
    arrangements: tuple[str, ...] = ("stages",)
    layout: str = ""
    device: str = ""
    copies: int = 1
    inside: bool = False
    trains: bool = False

    @property
    def version(self) -> str:
        """The installed version, empty where that cannot be known."""
        if not self.needs:
            return ""
        return str(getattr(import_module(self.needs[0]), "__version__", "")).split("-")[0]  # no build numbers

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def check(self) -> None:
        """Refuse a runtime that is not installed.

        Raises:
            ImportError: says what to type.
        """
        if self.missing:
            how = f"pip install 'convsplit[{self.extra}]'" if self.extra else f"pip install {' '.join(self.missing)}"
            raise ImportError(f"runtime {self.name!r} needs {', '.join(self.missing)}: {how}")

    def precision(self, dtype: torch.dtype) -> str:
        """What it computes in where a model's parameters are of this dtype."""
        return str(dtype).removeprefix("torch.")

    def clock(self, device: torch.device) -> Callable[[], float]:
        """Seconds, by a clock that tells what runs take here: it waits for the device."""
        from torch.utils.benchmark import timer  # its import takes long

        return timer

    def prepare(self, model: nn.Module, batch: Batch, forward: Forward | None = None) -> Run:
        """A callable that runs the model once on the batch, in inference, on the current number of threads.

        Raises:
            ValueError: the model does not run there; says why.
        """
        raise NotImplementedError

    def prepare_layer(self, layer: nn.Module, x: Tensor) -> Run:
        """Likewise for a convolution or split layer that takes one tensor. The layer is the callee's to keep."""
        return self.prepare(layer, x)


@dataclass(frozen=True)
class Custom(Runtime):
    """A function of the user's own, `(model, batch) -> run`, called for whole models and for single layers."""

    function: Prepare | None = None

    def prepare(self, model: nn.Module, batch: Batch, forward: Forward | None = None) -> Run:
        """Ask the function; a `forward` of the user's is put around the model first."""
        assert self.function is not None
        return self.function(model if forward is None else Through(model, forward), batch)


class Through(nn.Module):
    """A model that is run through a function `forward(model, batch)`."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self.through = model, forward

    def forward(self, batch: Batch) -> object:
        return self.through(self.model, batch)


def clock_of_cpu(device: torch.device) -> Callable[[], float] | None:
    """Seconds of work where a single thread of this process does all of it: other processes do not add to them."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else None


def vector_block(device: torch.device | None = None) -> int:
    """The multiple of channels that fills vector registers of float32: 16 with AVX-512, else 8.

    Onednn and MLAS store images in blocks of as many channels and leave their fast depthwise kernels where the last
    block is not full; tensor cores of GPUs want multiples of 8.
    """
    if device is not None and device.type != "cpu":
        return 8
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
