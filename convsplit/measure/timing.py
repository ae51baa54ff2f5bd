"""Taking turns: whole models, and layers within them, timed side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from convsplit.choose.plan import Conditions
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, call, quiet_run, tensors_in

ROUNDS = 9  # in which all candidates take their turn


LEAST_ROUNDS = 3


TURN_SECONDS = 4e-3  # a turn repeats what is shorter


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of a whole model, and of some of its modules within it (all calls of one run together)."""

    total: float
    layers: dict[str, float]


def milliseconds_in_turns(
    turns: Sequence[Callable[[], Any]],
    seconds: float,
    *,
    least_rounds: int = LEAST_ROUNDS,
    hopeless: float = math.inf,
) -> list[float]:
    """The median milliseconds of each, taken in turns, within about that many seconds.

    What takes `hopeless` times as long as the first turn already when it is warmed up is not run again.
    """
    from torch.utils.benchmark import timer  # waits for the device; its import takes long

    def turn(run: Callable[[], Any], repeats: int) -> float:
        start = timer()
        for _ in range(repeats):
            run()
        return (timer() - start) / repeats

    begin = timer()
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
        spent = timer() - begin
        if done + 1 >= least_rounds and spent * (done + 2) / (done + 1) > seconds:
            break
    return [1e3 * median(kept) for kept in times]


def conditions_of(model: nn.Module, inputs: Batch, *, training: bool = False) -> Conditions:
    """Where and how a model runs: its first parameter's device and dtype, its layout, the current number of threads."""
    weight = next(model.parameters(), torch.zeros(()))
    images = [t for t in (*tensors_in(inputs), *model.parameters()) if t.dim() == 4]
    last = any(t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in images)
    layout = "channels_last" if last else "contiguous"
    dtype = str(weight.dtype).removeprefix("torch.")
    device = "cpu" if weight.device.type == "cpu" else _device_name(weight.device)
    return Conditions(device, dtype, layout, torch.get_num_threads(), training)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def time_models(
    models: Sequence[nn.Module],
    batch: Batch,
    *,
    layers: Sequence[Sequence[str]] | None = None,
    forward: Forward | None = None,
    seconds: float = 2.0,
) -> list[Timing]:
    """Time models in turns on a batch, in inference; `layers` names the modules of each to be timed within it.

    Takes about `seconds` for each model (more where a few runs take longer) and leaves the models as they are.
    """
    run = forward or call

    def plain(model: nn.Module) -> Callable[[], Any]:
        return lambda: run(model, batch)

    watched: list[dict[str, list[float]]] = [{name: [] for name in names} for names in layers or [()] * len(models)]

    def inside(model: nn.Module, found: dict[str, list[float]]) -> Callable[[], Any]:
        def once() -> None:
            with _watched(model, found):
                run(model, batch)

        return once

    turns = [inside(model, found) for model, found in zip(models, watched, strict=True)]
    if layers is None:
        turns = [plain(model) for model in models]
    elif any(t.device.type != "cpu" for t in tensors_in(batch)):  # waiting for each layer would add to the totals
        turns = [*(plain(model) for model in models), *turns]
    with quiet_run(*models):
        totals = milliseconds_in_turns(turns, seconds * len(turns))
    found = [{name: 1e3 * median(times) for name, times in each.items() if times} for each in watched]
    return [Timing(total, each) for total, each in zip(totals, found, strict=False)]


@contextmanager
def _watched(model: nn.Module, found: dict[str, list[float]]) -> Iterator[None]:
    """Adds the seconds each module takes in one run of the model, all its calls together."""
    from torch.utils.benchmark import timer

    started: dict[str, list[float]] = {name: [] for name in found}
    spent = dict.fromkeys(found, 0.0)

    def enter(name: str, given: Given) -> None:
        started[name].append(timer())

    def leave(name: str, given: Given, output: Any) -> None:
        spent[name] += timer() - started[name].pop()

    with hooked({name: model.get_submodule(name) for name in found}, before=enter, after=leave):
        yield
    for name, seconds in spent.items():
        found[name].append(seconds)
