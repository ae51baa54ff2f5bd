"""Taking turns: whole models, and layers within them, timed side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from convsplit.choose.plan import Conditions
from convsplit.model.guards import same_globals
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, call, device_of, quiet_run, tensors_in
from convsplit.runtimes import Runtime, runtime_of
from convsplit.runtimes.base import Prepare, Run

ROUNDS = 9  # in which all candidates take their turn
LEAST_ROUNDS = 3
TURN_SECONDS = 4e-3  # a turn repeats what is shorter


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a whole model, and of some of its modules within it (all calls of one run together)."""

    total: float
    layers: dict[str, float]


def milliseconds_in_turns(
    turns: Sequence[Run],
    seconds: float,
    *,
    clock: Callable[[], float],
    least_rounds: int = LEAST_ROUNDS,
    hopeless: float = math.inf,
) -> list[float]:
    """The median milliseconds of each, taken in turns, within about that many seconds.

    `clock` is that of the runtime. A turn that returns a float has measured its milliseconds itself. What takes
    `hopeless` times as long as the first turn already when it is warmed up is not run again.
    """

    def turn(run: Run, repeats: int) -> float:
        start = clock()
        told = [run() for _ in range(repeats)]
        spent = clock() - start
        own = [each for each in told if isinstance(each, float)]
        return 1e-3 * sum(own) / repeats if len(own) == repeats else (spent / repeats)

    begin = perf_counter()
    once = []
    for run in turns:  # the first time is warm-up: kernels are picked and compiled
        first = turn(run, 1)
        once.append(first if first > 10 * TURN_SECONDS else turn(run, 1))
    repeats = [max(1, round(TURN_SECONDS / max(taken, 1e-7))) for taken in once]
    promising = [index for index, taken in enumerate(once) if taken <= hopeless * once[0]]
    times: list[list[float]] = [[] if index in promising else [taken] for index, taken in enumerate(once)]
    for done in range(ROUNDS):
        for index in promising:
            times[index].append(turn(turns[index], repeats[index]))
        spent = perf_counter() - begin
        if done + 1 >= least_rounds and spent * (done + 2) / (done + 1) > seconds:
            break
    return [1e3 * median(kept) for kept in times]


def conditions_of(
    model: nn.Module, inputs: Batch, *, training: bool = False, runtime: str | Runtime | Prepare = "torch"
) -> Conditions:
    """Where and how a model runs: its first parameter's device and dtype, its layout, the current number of threads."""
    runs = runtime_of(runtime)
    weight = next(model.parameters(), torch.zeros(()))
    images = [t for t in (*tensors_in(inputs), *model.parameters()) if t.dim() == 4]
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in images)
    layout = "channels_last" if last else "contiguous"
    device = "cpu" if weight.device.type == "cpu" else _device_name(weight.device)
    return Conditions(
        runs.device or device, runs.precision(weight.dtype), runs.layout or layout, torch.get_num_threads(), training,
        runs.name, runs.version,
    )  # fmt: skip


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def time_models(
    models: Sequence[nn.Module],
    batch: Batch,
    *,
    layers: Sequence[Sequence[str]] | None = None,
    forward: Forward | None = None,
    seconds: float = 2.0,
    runtime: str | Runtime | Prepare = "torch",
) -> list[Timing]:
    """Time models in turns on a batch, in inference; `layers` names the modules of each to be timed within it.

    Takes about `seconds` for each model (more where a few runs take longer) and leaves the models as they are. Layers
    are timed in eager PyTorch alone: other runtimes do not let anybody look inside.
    """
    runs, run = runtime_of(runtime), forward or call
    device = device_of(nn.ModuleList(models), batch)
    if not runs.inside:
        ready = [prepared(runs, model, batch, forward) for model in models]
        return time_runs(ready, runs.clock(device), seconds=seconds)

    def plain(model: nn.Module) -> Run:
        return lambda: _nothing(run(model, batch))

    watched: list[dict[str, list[float]]] = [{name: [] for name in names} for names in layers or [()] * len(models)]

    def inside(model: nn.Module, found: dict[str, list[float]]) -> Run:
        def once() -> None:
            with _watched(model, found, runs.clock(device)):
                run(model, batch)

        return once

    turns = [inside(model, found) for model, found in zip(models, watched, strict=True)]
    if layers is None:
        turns = [plain(model) for model in models]
    elif device.type != "cpu":  # waiting for each layer would add to the totals
        turns = [*(plain(model) for model in models), *turns]
    with quiet_run(*models):
        totals = milliseconds_in_turns(turns, seconds * len(turns), clock=runs.clock(device))
    found = [{name: 1e3 * median(times) for name, times in each.items() if times} for each in watched]
    return [Timing(total, each) for total, each in zip(totals, found, strict=False)]


def prepared(runtime: Runtime, model: nn.Module, batch: Batch, forward: Forward | None = None) -> Run:
    """A callable that runs the model once, in inference; the model is left as it is."""
    with quiet_run(model):
        return runtime.prepare(model, batch, forward)


def time_runs(runs: Sequence[Run], clock: Callable[[], float], *, seconds: float = 2.0) -> list[Timing]:
    """Time what was prepared, in turns, for about `seconds` each."""
    with same_globals():
        return [Timing(total, {}) for total in milliseconds_in_turns(runs, seconds * len(runs), clock=clock)]


def _nothing(output: Any) -> None:
    """Outputs are no milliseconds."""


@contextmanager
def _watched(model: nn.Module, found: dict[str, list[float]], clock: Callable[[], float]) -> Iterator[None]:
    """Adds the seconds each module takes in one run of the model, all its calls together."""
    started: dict[str, list[float]] = {name: [] for name in found}
    spent = dict.fromkeys(found, 0.0)

    def enter(name: str, given: Given) -> None:
        started[name].append(clock())

    def leave(name: str, given: Given, output: Any) -> None:
        spent[name] += clock() - started[name].pop()

    with hooked({name: model.get_submodule(name) for name in found}, before=enter, after=leave):
        yield
    for name, seconds in spent.items():
        found[name].append(seconds)
