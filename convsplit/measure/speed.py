"""Choosing by measured time: layers that would not get faster stay dense, and budgets of milliseconds are met.

Options are measured alone (`Stopwatch`), the choice is then measured within the model, where caches and memory are
shared, and made anew if it does not hold there. Split layers get random numbers for that, not factors.

Eager PyTorch lets hooks time each layer within the model. Other runtimes do not: there the whole model is timed before
and after, layers keep what they took alone, and what the model gained is what the layers gained together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from convsplit.choose.allocation import allocate
from convsplit.choose.budget import Budget
from convsplit.choose.options import Menu, Option, closest_split
from convsplit.choose.plan import Conditions, Plan, PlannedLayer
from convsplit.measure.stopwatch import Stopwatch, with_noise
from convsplit.measure.timing import Timing, conditions_of, prepared, time_models, time_runs
from convsplit.model.copies import scratch_copy
from convsplit.model.running import Batch, Forward, device_of
from convsplit.rewrite import apply_plan
from convsplit.runtimes import Runtime
from convsplit.tables import milliseconds

PREFERENCES = ("accuracy", "speed")
MARGIN = 0.97  # of the dense layer's time: what an option must stay below to count as faster
TRIES = 5  # of making the choice again
HALVINGS = 10  # of the milliseconds within which a budget of MACs is kept
CLOSE, TOLERANCE = 0.02, 0.05  # of the wanted fraction: what is aimed at, and what is accepted

_HINT = '; options that are not measured faster than the dense layers were left out, prefer="accuracy" has them all'


@dataclass(frozen=True)
class Timed:
    """A choice with its measurements: one option per menu, of the whole model the time before and after."""

    menus: list[Menu]
    chosen: list[Option]
    model_milliseconds: tuple[float, float]
    conditions: Conditions


def choose_by_time(
    model: nn.Module,
    example_inputs: Batch,
    menus: Sequence[Menu],
    budget: Budget | None,
    *,
    prefer: str,
    stopwatch: Stopwatch,
    model_params: int,
    model_macs: int | None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Timed:
    """Choose one option per menu as `allocate` does (or the closest, without a budget), by measured milliseconds.

    With `prefer="speed"`, options that are not measured faster than the dense layer are removed from the menus. The
    milliseconds of the options chosen are those measured within the model.

    Raises:
        ValueError: as `allocate`; also where no choice is as fast within the model as a budget of latency asks.
    """
    model = scratch_copy(model)  # which is run, and may write to its weights or its state meanwhile
    runtime = stopwatch.where
    conditions = conditions_of(model, example_inputs, training=stopwatch.training, runtime=runtime)
    offered = stopwatch.timed(menus, conditions, progress=progress)
    if prefer == "speed":
        offered = [_faster_only(menu) for menu in offered]
    asked, best = budget, None
    aim = _Aim(budget) if budget is not None and budget.kind == "latency" else None
    within = _Within(model, example_inputs, forward, runtime)
    whole = within.alone()
    offered = [_no_longer(menu, offered, whole) for menu in offered] if not runtime.inside else offered
    for attempt in range(TRIES):
        try:
            chosen = _choose(offered, asked, prefer, model_params, model_macs, whole.total)
        except ValueError as error:
            if best is not None and aim is not None:  # asked for less than there is, on the way
                asked = aim.raised()
                continue
            raise ValueError(f"{error}{_HINT if prefer == 'speed' else ''}") from error
        before, after = within.measured(offered, chosen)
        timed = _in_place(offered, chosen, before, after, conditions)
        again = False
        if prefer == "speed":  # the last try finds such layers with their dense option only
            offered, again = _without_slower(offered, chosen, timed, narrower=1 - (attempt + 1) / (TRIES - 1))
        if aim is None or best is None or aim.missed_by(timed) < aim.missed_by(best):
            best = timed
        if aim is not None:
            again = again or aim.missed_by(timed) > (False, CLOSE)
            asked = aim.corrected(timed)
        if not again:
            break
    assert best is not None
    if aim is not None and aim.missed_by(best)[0]:
        raise ValueError(
            f"{budget!r} could not be reached: the best of {TRIES} tries kept {aim.kept(best):.3f} of the "
            f"milliseconds, measured within the model ({conditions})"
        )
    return best


def _no_longer(menu: Menu, offered: Sequence[Menu], whole: Timing) -> Menu:
    """The menu with milliseconds in which all layers together, dense, take no longer than the whole model.

    Alone they may: what comes before and after a layer is not fused into it, and its input comes from memory.
    """
    scale = min(1.0, whole.total / max(1e-9, sum(each.dense.milliseconds or 0.0 for each in offered)))
    options = (replace(each, milliseconds=scale * (each.milliseconds or 0.0)) for each in menu.options)
    return replace(menu, options=tuple(options))


def _faster_only(menu: Menu) -> Menu:
    """The dense option and those that beat it."""
    time = menu.dense.milliseconds or 0.0
    faster = [option for option in menu.options[1:] if (option.milliseconds or 0.0) < MARGIN * time]
    if faster or len(menu.options) == 1 or not time:
        return replace(menu, options=(menu.dense, *faster))
    quickest = min(option.milliseconds or 0.0 for option in menu.options[1:])
    note = f"no option is faster: dense {milliseconds(time)} ms, the fastest {milliseconds(quickest)} ms"
    return replace(menu, options=(menu.dense,), note=note)


def _choose(
    menus: list[Menu], budget: Budget | None, prefer: str, model_params: int, model_macs: int | None,
    model_milliseconds: float,
) -> list[Option]:  # fmt: skip
    if budget is None:
        return [closest_split(menu) for menu in menus]

    def within(asked: Budget) -> list[Option]:
        return allocate(
            menus, asked, model_params=model_params, model_macs=model_macs, model_milliseconds=model_milliseconds
        ).options

    chosen = within(budget)
    if prefer == "speed" and budget.kind in ("params", "macs"):
        return _by_milliseconds(chosen, budget.kind, within)
    return chosen


def _by_milliseconds(chosen: list[Option], kind: str, within: Callable[[Budget], list[Option]]) -> list[Option]:
    """Of the choices that cost no more parameters or MACs than this one, the best for the milliseconds it takes.

    A budget of MACs asks for those MACs; where they are spent time decides, so that forms and layers in which a MAC
    takes longest get fewest. Budgets of milliseconds are narrowed down, by halves, to the largest that costs no more.
    """

    def cost(options: list[Option]) -> int:
        return sum(getattr(option, kind) or 0 for option in options)

    low, high, best, allowed = 0.0, 1.0, chosen, cost(chosen)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        try:
            found = within(Budget(latency=middle))
        except ValueError:  # faster than anything is
            low = middle
            continue
        if cost(found) <= allowed:
            low, best = middle, found
        else:
            high = middle
    return best


class _Within:
    """A model that choices are tried in. Where it has to be exported to run, that is done once."""

    def __init__(self, model: nn.Module, example_inputs: Batch, forward: Forward | None, runtime: Runtime) -> None:
        self.model, self.inputs, self.forward, self.runtime = model, example_inputs, forward, runtime
        self.clock = runtime.clock(device_of(model, example_inputs))
        self.run = None if runtime.inside else prepared(runtime, model, example_inputs, forward)

    def alone(self) -> Timing:
        """The model as it is."""
        if self.run is None:
            return time_models([self.model], self.inputs, forward=self.forward)[0]
        return time_runs([self.run], self.clock)[0]

    def measured(self, menus: list[Menu], chosen: list[Option]) -> tuple[Timing, Timing]:
        """The model as it is and as chosen, and all layers that could be split within both if those can be seen."""
        planned = tuple(
            PlannedLayer(menu.site.name, menu.site.spec, menu.dense, option)
            for menu, option in zip(menus, chosen, strict=True)
        )
        trial = with_noise(apply_plan(self.model, Plan(planned, 0), initialise=False, progress=False))
        if self.run is None:
            names = [menu.site.name for menu in menus if menu.site.calls]
            before, after = time_models([self.model, trial], self.inputs, layers=[names, names], forward=self.forward)
        else:
            tried = prepared(self.runtime, trial, self.inputs, self.forward)
            before, after = time_runs([self.run, tried], self.clock)
        return before, after


def _in_place(
    menus: list[Menu], chosen: list[Option], before: Timing, after: Timing, conditions: Conditions
) -> Timed:
    """The choice with the milliseconds measured within the model; a layer left dense takes what it took before."""
    shared = _kept_of_gains(menus, chosen, before.total - after.total)
    updated, options = [], []
    for menu, option in zip(menus, chosen, strict=True):
        name, alone = menu.site.name, menu.dense.milliseconds or 0.0
        slow = before.layers.get(name, 0.0) if before.layers else alone
        gained = shared * (alone - (option.milliseconds or 0.0))
        fast = after.layers.get(name, 0.0) if before.layers else max(0.0, alone - gained)
        dense = replace(menu.dense, milliseconds=slow)
        updated.append(replace(menu, options=(dense, *menu.options[1:])))
        options.append(dense if option.dense else replace(option, milliseconds=fast))
    return Timed(updated, options, (before.total, after.total), conditions)


def _kept_of_gains(menus: list[Menu], chosen: list[Option], gained: float) -> float:
    """What the model gained over what its layers gain alone."""
    alone = sum(
        (menu.dense.milliseconds or 0.0) - (option.milliseconds or 0.0)
        for menu, option in zip(menus, chosen, strict=True)
    )
    return gained / alone if alone > 0 else 1.0


def _without_slower(
    menus: list[Menu], chosen: list[Option], timed: Timed, *, narrower: float
) -> tuple[list[Menu], bool]:
    """Where an option turned out slower within the model, keep only narrower ones, by a factor, of any form."""
    kept, changed = [], False
    for menu, option, place, found in zip(menus, chosen, timed.menus, timed.chosen, strict=True):
        slow, fast = place.dense.milliseconds or 0.0, found.milliseconds or 0.0
        if option.dense or fast < slow:
            kept.append(menu)
            continue
        changed = True
        left = tuple(o for o in menu.options if o.macs is None or o.dense or o.macs < narrower * (option.macs or 0))
        text = f"slower within the model: dense {milliseconds(slow)} ms, {option.structure} {milliseconds(fast)} ms"
        kept.append(replace(menu, options=left, note=text if len(left) == 1 else menu.note))
    return kept, changed


class _Aim:
    """What to ask of the milliseconds of layers alone, so that within the model a budget of latency is met.

    What was asked is corrected by the ratio of what was wanted and what came of it, but stays between the largest that
    came out too fast and the smallest that came out too slow: where few layers have few options one step can be too
    long, and ratios alone would go to and fro.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget, self.asked = budget, budget.fraction
        self.fast, self.slow = 0.0, 1.0  # at 1 all layers are dense

    def kept(self, timed: Timed) -> float:
        """What was kept of the milliseconds that the budget is a fraction of."""
        if self.budget.of == "model":
            return timed.model_milliseconds[1] / timed.model_milliseconds[0]
        before = sum(menu.dense.milliseconds or 0.0 for menu in timed.menus)
        return sum(option.milliseconds or 0.0 for option in timed.chosen) / max(before, 1e-12)

    def missed_by(self, timed: Timed) -> tuple[bool, float]:
        """Whether it is slower than is accepted, and how far from what is wanted, relative to it."""
        missed = self.kept(timed) / self.budget.fraction - 1
        return missed > TOLERANCE, abs(missed)

    def corrected(self, timed: Timed) -> Budget:
        """What to ask next, after this came of what was asked last."""
        kept = max(self.kept(timed), 1e-6)
        if kept > self.budget.fraction:
            self.slow = min(self.slow, self.asked)
        else:
            self.fast = max(self.fast, self.asked)
        return self._next(self.asked * self.budget.fraction / kept)

    def raised(self) -> Budget:
        """What to ask next, after nothing was as fast as what was asked last."""
        self.fast = max(self.fast, self.asked)
        return self._next(self.asked)

    def _next(self, wanted: float) -> Budget:
        self.asked = wanted if self.fast < wanted < self.slow else (self.fast + self.slow) / 2
        return Budget(latency=self.asked, of=self.budget.of)
