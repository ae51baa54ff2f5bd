"""Faults injected into conversions: an exception from the N-th call of torch, for N over the whole range.

Every call of torch from Python counts, in whatever Python thread it is made: new threads get the counter with them.
What runs inside torch, in C++, is not reached, and calls that put things back, in a `finally` block or an `__exit__`,
are spared (the fault then comes with the next call): nothing could put back what they did not. For `save`, the calls to
the operating system count as well. Faults are in turn an error such as torch raises and an interruption such as Ctrl-C.
"""

from __future__ import annotations

import ast
import copy
import functools
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import public
import torch
from snapshot import snapshot
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import convsplit
from convsplit import storage

SYSTEM_CALLS = ("open", "fsync", "replace", "close")


class Fault(RuntimeError):
    """What torch might have raised."""


class Interruption(KeyboardInterrupt):
    """What Ctrl-C might have raised."""


@dataclass
class Counter:
    """Counts calls, and raises at one of them."""

    at: int = 0  # 0 never raises
    calls: int = 0
    raised: bool = False
    writes: list[int] = field(default_factory=list)  # the calls made while something is written into a model
    lock: Any = field(default_factory=threading.Lock)

    def count(self) -> None:
        with self.lock:
            self.calls += 1
            if not self.at and _called_by("store"):
                self.writes.append(self.calls)
            reached = 0 < self.at <= self.calls and not self.raised and not _restoring()
            self.raised = self.raised or reached
        if reached:
            raise (Fault if self.at % 2 else Interruption)(f"at call {self.at}")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _called_by(name: str) -> bool:
    """Whether a function of that name, of the library's, is under way."""
    return any(f.f_code.co_name == name and _is_ours(f) for f in _frames())


def _restoring() -> bool:
    """Whether a context is being left: by `__exit__`, or in a `finally` block of the library or of `fork_rng`."""
    for frame in _frames():
        name = frame.f_code.co_name
        if name == "__exit__":
            return True
        if (_is_ours(frame) or name == "fork_rng") and any(
            frame.f_lineno in lines for lines in _final_lines(frame.f_code.co_filename)
        ):
            return True
    return False


def _is_ours(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] == "convsplit"


@functools.cache
def _final_lines(filename: str) -> list[range]:
    """The lines of all `finally` blocks of a file."""
    tree = ast.parse(Path(filename).read_text(encoding="utf-8"))
    blocks = [node.finalbody for node in ast.walk(tree) if isinstance(node, ast.Try) and node.finalbody]
    return [range(block[0].lineno, (block[-1].end_lineno or block[-1].lineno) + 1) for block in blocks]


class _Counted(TorchFunctionMode):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counter.count()
        return function(*args, **(kwargs or {}))


@contextmanager
def counting(counter: Counter, *, system: bool = False) -> Iterator[None]:
    """Count the calls of torch in this thread and those that begin meanwhile; with `system`, those of `os` too."""
    run = threading.Thread.run

    def counted(thread: threading.Thread) -> None:
        with _Counted(counter):
            run(thread)

    def stepped(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            counter.count()
            return function(*args, **kwargs)

        return step

    with ExitStack() as stack:
        stack.enter_context(patch.object(threading.Thread, "run", counted))
        if system:
            for name in SYSTEM_CALLS:
                stack.enter_context(patch.object(os, name, stepped(getattr(os, name))))
            stack.enter_context(patch.object(storage, "save_file", stepped(storage.save_file)))
        stack.enter_context(_Counted(counter))
        yield


def injected(counter: Counter, work: Callable[[], Any], *, system: bool = False) -> bool:
    """Whether the fault came out of the work; another error than the fault, or one it led to, is raised."""
    try:
        with counting(counter, system=system):
            work()
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Fault | Interruption):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return True
    return False


class Small(nn.Module):
    """Three convolutions, a shortcut, batch norm, and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.last = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 4)
        self.left.register_forward_hook(_look)
        self.notes = ["mine"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x + self.left(x).relu()).mean((2, 3)))


def _look(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that changes nothing."""


class Bench:
    """A model, its conversion and inputs, and what is tried on them. Each try says whether the fault came out."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Small().train()
        self.model.left.eval()
        self.batches = list(torch.randn(64, 3, 9, 9).split(32))
        self.converted = public.convert(self.model, self.batches[0])
        self.answer = public.run(copy.deepcopy(self.converted).eval(), self.batches[0])
        self.repaired = copy.deepcopy(self.converted)
        public.refit(self.repaired, self.model, self.batches)

    def convert(self, counter: Counter) -> bool:
        """The model is as it was, and so are torch's settings."""
        return self.guarded(counter, lambda: public.convert(self.model, self.batches[0], self.batches))

    def refit(self, counter: Counter) -> bool:
        """Besides: every layer is repaired or as it was, and nothing is left behind in the converted model."""
        converted = copy.deepcopy(self.converted)
        before = snapshot(converted, values=False)
        came = self.guarded(counter, lambda: public.refit(converted, self.model, self.batches))
        assert _without_biases(snapshot(converted, values=False)) == _without_biases(before)
        if came:
            for name, module in converted.named_modules():
                if isinstance(module, convsplit.SeparableConv2d | nn.Conv2d) and not _inside_split(converted, name):
                    state = module.state_dict()
                    whole = (each.get_submodule(name).state_dict() for each in (self.converted, self.repaired))
                    assert any(_equal(state, other) for other in whole), f"{name} is half repaired"
        return came

    def distill(self, counter: Counter) -> bool:
        """Besides: the converted model has its modes, flags and hooks, finite weights, and is no worse for it."""
        converted = copy.deepcopy(self.converted)
        before = snapshot(converted, values=False)
        came = self.guarded(counter, lambda: public.distill(converted, self.model, self.batches))
        assert snapshot(converted, values=False) == before
        assert all(bool(value.isfinite().all()) for value in converted.state_dict().values())
        if came:
            wanted = public.run(copy.deepcopy(self.model).eval(), self.batches[-1])[0]
            assert _loss(converted, self.batches[-1], wanted) <= 1.01 * _loss(
                self.converted, self.batches[-1], wanted
            )
        return came

    def save(self, counter: Counter) -> bool:
        """The file holds the old model or the new one, whole; no other file is there; the model is as it was."""
        before = snapshot(self.converted)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            convsplit.save(self.repaired, path)
            old = path.read_bytes()
            came = self.guarded(counter, lambda: convsplit.save(self.converted, path), system=True)
            assert [each.name for each in Path(folder).iterdir()] == [path.name]
            loaded = convsplit.load(path, self.model)
            if path.read_bytes() != old:
                assert _equal(loaded.state_dict(), self.converted.state_dict())
            else:
                assert came
        assert snapshot(self.converted) == before
        return came

    def guarded(self, counter: Counter, work: Callable[[], Any], *, system: bool = False) -> bool:
        """Run it with the counter; the original, torch's settings and the threads are afterwards as before."""
        before, settings, threads = snapshot(self.model), _settings(), threading.active_count()
        came = injected(counter, work, system=system)
        assert snapshot(self.model) == before, "the original was changed"
        assert _settings() == settings, "a setting of torch was changed"
        assert threading.active_count() <= threads, "a thread is left"
        return came


STEPS = ("convert", "refit", "distill", "save")


def positions(bench: Bench, step: str, count: int) -> list[int]:
    """Numbers of calls: evenly over all that a step makes, the ends among them, and as many where it writes."""
    counter = Counter()
    getattr(bench, step)(counter)
    return sorted({*_spread(range(1, counter.calls + 1), count), *_spread(counter.writes, count)})


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    last = len(numbers) - 1
    return [numbers[round(index * last / max(count - 1, 1))] for index in range(count)] if numbers else []


def _settings() -> tuple[Any, ...]:
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
    return (*modes, torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state().numpy().tobytes())


def _without_biases(frozen: dict[str, Any]) -> dict[str, Any]:
    """A repair may give layers biases, which their numbers tell."""
    return {
        name: (*kind, {key: value for key, value in held.items() if key not in ("_parameters", "spec", "bias")})
        for name, (*kind, held) in frozen.items()
    }


def _inside_split(model: nn.Module, name: str) -> bool:
    parents = (name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1))
    return any(isinstance(model.get_submodule(parent), convsplit.SeparableConv2d) for parent in parents)


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two layers hold the same; a bias of zeros is as good as none."""
    names = first.keys() | second.keys()
    pairs = [(first.get(name, torch.zeros(())), second.get(name, torch.zeros(()))) for name in names]
    return all(bool((a == b).all()) for a, b in pairs)


def _loss(model: nn.Module, batch: Tensor, wanted: Tensor) -> float:
    student = public.run(copy.deepcopy(model).eval(), batch)[0]
    T = 2.0  # the default temperature
    log = nn.functional.log_softmax
    return float(
        nn.functional.kl_div(log(student / T, 1), log(wanted / T, 1), reduction="batchmean", log_target=True)
    )
