"""A study: what is known of a model before anything is decided. Made once, then asked for plans and conversions.

    model -> trace -> sites -> menus (error curves) -> allocation -> rewriting -> repair
             '---------------- once ------------'     '------ for every question ------'

The curves of a model do not depend on the budget, so a plan costs an allocation, and a conversion the layers it splits.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, cast

from torch import nn
from torch.nn.parameter import UninitializedParameter

from convsplit.choose.allocation import Allocation, allocate
from convsplit.choose.budget import Budget
from convsplit.choose.options import (
    Menu,
    Option,
    check_rank,
    closest_split,
    dense_option,
    exact_menus,
    find_menus,
    unless_measured,
)
from convsplit.choose.plan import Conditions, Plan, planned_layers
from convsplit.choose.search import MOST
from convsplit.data.batches import Checked, checked_batches, hold_out
from convsplit.data.moments import Assumed, Marginals, measure_marginals
from convsplit.data.sensitivity import measure_gains
from convsplit.forms import CP, Form
from convsplit.kinds import is_linear
from convsplit.layers.separable import SeparableConv
from convsplit.measure.speed import PREFERENCES, choose_by_time
from convsplit.measure.stopwatch import Stopwatch
from convsplit.model.copies import scratch_copy
from convsplit.model.graphs import Trace, trace
from convsplit.model.guards import plain_arithmetic, same_globals
from convsplit.model.reach import unused_layers
from convsplit.model.running import Batch, Forward
from convsplit.model.sites import POINTWISE, SKIPPED, Site, Skip, find_sites
from convsplit.progress import track, warn
from convsplit.repair.refitting import refit
from convsplit.report.curves import Frontier, curve_of
from convsplit.report.found import Found
from convsplit.report.frontier import measured_point, planned_point
from convsplit.report.quality import HeldOut
from convsplit.rewrite import apply_plan
from convsplit.searches import Finetune, find_cheapest
from convsplit.spec import ConvSpec, noun, parameter_count
from convsplit.structure import forms_named
from convsplit.tables import Table, Tabular, count

if TYPE_CHECKING:
    from typing_extensions import Unpack

M = TypeVar("M", bound=nn.Module)

HALF = Budget(params=0.5)
BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)


class StudyOptions(TypedDict, total=False):
    """The keyword arguments of `study`, which every function that makes a study takes."""

    calibration: Any
    forward: Forward | None
    forms: str | Sequence[str] | None
    skip: Skip
    bake: bool
    linear: bool
    seed: int
    progress: bool | None


def checked_options(function: Callable[..., Any], options: StudyOptions) -> StudyOptions:
    """The options that a function hands on to a study, if a study has them all.

    Raises:
        TypeError: one that neither has; says which there are.
    """
    own = [name for name in inspect.signature(function).parameters if name != "options"]
    for name in options:
        if name not in StudyOptions.__annotations__:
            known = ", ".join([*own, *StudyOptions.__annotations__])
            raise TypeError(f"{function.__name__}() has no argument {name!r}; it takes {known}")
    return options


class ChoiceOptions(TypedDict, total=False):
    """The keyword arguments of `Study.plan` but for the budget."""

    rank: int | None
    exact: bool
    prefer: str
    stopwatch: Stopwatch | None


class Study(Tabular, Generic[M]):
    """What is known of a model: its convolutions, what can become of each, and what its inputs tell.

    Args:
        model: any module. It is never changed; while the study is used, neither should anybody else change it.
        example_inputs: what the model is called with once: a tensor, a tuple of positional arguments or a dict of
            keyword arguments. They tell the shapes, so MACs are known and no layer gets more of them. By default the
            first batch of `calibration`.
        calibration: a few hundred unlabelled inputs, as batches (an iterable, read once, of what `example_inputs` may
            be): ranks are then chosen by the error of each layer's output, and conversions are repaired by `refit`.
        forward: how to run a model on a batch or on `example_inputs`, such as `lambda model, batch: model(batch[0])`.
        forms: which of "dw-pw", "pw-dw" and "pw-dw-pw" to choose from, layer by layer; all by default. With "pw-pw"
            among them 1x1 kernels are split, too.
        skip: layers to leave alone: names, glob patterns, or a predicate `(name, module) -> bool`.
        bake: also split layers whose weight is computed at every call (parametrizations, weight_norm, spectral_norm,
            pruning masks, timm's StdConv2d), by splitting the weight that runs in eval mode for good.
        linear: also split linear layers into two of lower rank, whatever `forms` says; they then count as splittable.
        seed: fixes the start of CP; the same seed gives the same result (choices by measured time may differ).
        progress: show progress bars; by default only on a terminal.

    Raises:
        TypeError: not a module, or one that cannot be deep-copied.
        ValueError: an unknown form, example inputs that do not run (names the module and the shapes), a `skip` that
            matches nothing, calibration data that are empty or not finite.

    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> known = Study(model)
    >>> half, quarter = known.plan(Budget(params=0.5)), known.plan(Budget(params=0.25))
    >>> half.totals()["params_after"] > quarter.totals()["params_after"]
    True
    """

    def __init__(
        self,
        model: M,
        example_inputs: Batch = None,
        *,
        calibration: Any = None,
        forward: Forward | None = None,
        forms: str | Sequence[str] | None = None,
        skip: Skip = (),
        bake: bool = False,
        linear: bool = False,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; want a torch.nn.Module, such as resnet18()")
        self.model, self.forward, self.forms, self.skip, self.bake = model, forward, forms, skip, bake
        self.linear, self.seed, self.progress = linear, seed, progress
        pointwise = any(not form.filters for form in forms_named(forms))  # an unknown one is refused before all else
        self.batches = None if calibration is None else checked_batches(calibration)
        if example_inputs is None and self.batches:
            example_inputs = self.batches[0]
        self.example_inputs = example_inputs
        self.trace: Trace = trace(model, example_inputs, forward)
        with same_globals(), plain_arithmetic():  # users' own functions look at layers and say what they equal
            self.sites: list[Site] = find_sites(
                model, self.trace, skip=skip, bake=bake, pointwise=pointwise, linear=linear
            )
        self.stopwatch = Stopwatch()
        self._versions = _versions(model)

    @cached_property
    def menus(self) -> list[Menu]:
        """The options of every layer that can be split, over a grid of ranks, with their errors."""
        self._check_unchanged()
        with same_globals(), plain_arithmetic():
            return find_menus(
                self.sites, forms=self._forms(), marginals=self.marginals, seed=self.seed,
                progress=self.progress,
            )  # fmt: skip

    @cached_property
    def timed_menus(self) -> list[Menu]:
        """Also dw-pw and pw-dw with equal multiplicities, which may be faster where they are less accurate."""
        forms = [form for form in self._forms() if not (form.expands and form.projects)]
        if not forms:
            return self.menus
        equal = find_menus(
            self.sites, forms=forms, even=True, marginals=self.marginals, seed=self.seed, progress=self.progress
        )
        return [
            replace(menu, options=(*menu.options, *more.options[1:]))
            for menu, more in zip(self.menus, equal, strict=True)
        ]

    @cached_property
    def marginals(self) -> dict[str, Marginals | Assumed]:
        """The metric of the inputs of every layer that can be split: measured, or assumed without calibration data."""
        convs = {site.name: site.original.conv for site in self.sites if site.splittable and site.original}
        if self.batches is None:
            specs = {name: ConvSpec.of(conv) for name, conv in convs.items()}
            return {
                name: Assumed.of(spec, convs[name].weight.device)
                for name, spec in specs.items()
                if spec.positions > 1
            }
        with same_globals(), plain_arithmetic():
            return dict(measure_marginals(scratch_copy(self.model), convs, self.batches, self.forward))

    def plan(
        self,
        budget: Budget | None = None,
        *,
        rank: int | None = None,
        exact: bool = False,
        prefer: str = "accuracy",
        stopwatch: Stopwatch | None = None,
    ) -> Plan:
        """Decide what becomes of every convolution, without converting anything.

        Args:
            budget: what may be kept; half the parameters of the splittable convolutions by default.
            rank: instead, the same rank for every layer: the depth multiplier of dw-pw and pw-dw (those two are chosen
                from unless `forms` says otherwise) or, with `forms="pw-dw-pw"`, the CP rank.
            exact: instead, an exact rewriting of every layer, whatever that costs.
            prefer: "speed" keeps every layer dense for which no option is measured faster on this machine, at the
                shapes of the example inputs; "accuracy" goes by the budget alone.
            stopwatch: how long to measure, and whether inference or training, for budgets of latency and
                `prefer="speed"`; the study's own by default. What one has measured it remembers.

        Raises:
            ValueError: a budget that cannot be met (names the smallest that can), more than one of `budget`, `rank`
                and `exact`, a bad rank, or no example inputs where they are needed.
        """
        self._check_unchanged()
        asked = check_asked(budget, rank, exact)
        if budget is not None and budget.of_quality:
            return self.search(budget, prefer=prefer, stopwatch=stopwatch).checked().plan
        check_rank(rank)
        budget = budget if asked else HALF
        if not self.sites:
            warn(_nothing_found(self.model, self.linear))
        timed = prefer == "speed" or (budget is not None and budget.kind == "latency")
        _check_preference(prefer, timed, budget, self.example_inputs)
        with same_globals(), plain_arithmetic():
            menus = self._menus(rank, exact)
            if timed:
                menus = self.timed_menus if rank is None and not exact else menus
                return self._timed(menus, budget, prefer, stopwatch or self.stopwatch)
            sites = self.sites if exact else [unless_measured(site) for site in self.sites]
            allowed = {site.name for site in sites if site.splittable}
            menus = [menu for menu in menus if menu.site.name in allowed]
            if self.sites and all(len(menu.options) == 1 for menu in menus):
                _warn_of_reasons(self.title, sites)
            found = self._choose(menus, budget)
            return replace(self._plan(menus, found.options, budget, sites=sites), gap=found.gap)

    def timed_plan(self, budget: Budget, *, prefer: str = "accuracy", stopwatch: Stopwatch | None = None) -> Plan:
        """The plan for a budget of any kind, with the milliseconds that everything in it takes."""
        _check_preference(prefer, True, budget, self.example_inputs)
        with same_globals(), plain_arithmetic():
            return self._timed(self.timed_menus, budget, prefer, stopwatch or self.stopwatch)

    def convert(self, budget: Budget | None = None, **choice: Unpack[ChoiceOptions]) -> M:
        """Plan, rewrite and, where there are calibration data, repair. Arguments as for `plan`.

        Returns:
            a deep copy of the model's own class, split layers under their old names.

        >>> known = Study(nn.Sequential(nn.Conv2d(8, 16, 3)))
        >>> type(known.convert(rank=2)[0]).__name__
        'SeparableConv2d'
        """
        if budget is not None and budget.of_quality:
            check_asked(budget, choice.get("rank"), choice.get("exact", False))
            prefer, stopwatch = choice.get("prefer", "accuracy"), choice.get("stopwatch")
            found = self.search(budget, prefer=prefer, stopwatch=stopwatch).checked()
            return cast("M", found.model)
        return self.apply(self.plan(budget, **choice))

    def search(
        self,
        budget: Budget,
        *,
        held_out: Any = 1 / 3,
        most: int = MOST,
        then: Finetune | None = None,
        prefer: str = "accuracy",
        stopwatch: Stopwatch | None = None,
    ) -> Found:
        """Look for the cheapest conversion, repaired, that loses no more quality than a budget allows.

        Each of a handful of conversions is measured on inputs that neither choice nor repair has seen, and corrects
        where the next one is tried.

        Args:
            budget: one of drift, agreement or metric.
            held_out: a share of the calibration inputs, or batches of their own. A metric has its own inputs, so
                nothing need be held out for it.
            most: conversions to try.
            then: what else to do to the conversion that was found, called with (converted, original, batches), such as
                `convsplit.distill`; it is measured once more.
            prefer: as for `plan`.
            stopwatch: as for `plan`.

        Returns:
            what was found, with everything that was tried; `found.met` says whether the target was.

        Raises:
            ValueError: a budget of what may be kept, no calibration data, or too few of them.

        >>> known = Study(nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)),
        ...               calibration=torch.randn(96, 8, 9, 9))
        >>> found = known.search(Budget(drift=0.5))
        >>> found.met, len(found.trials) <= 5
        (True, True)
        """
        if not budget.of_quality:
            raise ValueError(f"{budget!r} says what may be kept: plan() and convert() take it; search for drift=, "
                             "agreement= or metric=")  # fmt: skip
        if self.batches is None:
            raise ValueError(f"{budget!r} is measured on inputs: give calibration=, some hundred unlabelled ones")
        self._check_unchanged()
        known, held = self._holding_out(budget, held_out)
        alike = known.batches if isinstance(held_out, float | int) and known.batches else ()
        meter = HeldOut(self.model, held, self.forward, budget, alike)
        return find_cheapest(known, meter, most=most, then=then, prefer=prefer, stopwatch=stopwatch)

    def _holding_out(self, budget: Budget, held_out: Any) -> tuple[Study[M], Checked]:
        """A study of the same model that knows nothing of the inputs held out, and those."""
        assert self.batches is not None
        if not isinstance(held_out, float | int):
            return self, checked_batches(held_out)
        if budget.kind == "metric":
            return self, self.batches
        kept, held = hold_out(self.batches, held_out)
        known = Study(
            self.model, self.example_inputs, calibration=kept, forward=self.forward, forms=self.forms, skip=self.skip,
            bake=self.bake, linear=self.linear, seed=self.seed, progress=self.progress,
        )  # fmt: skip
        return known, held

    def predicted_drift(self, plan: Plan) -> float:
        """The relative drift of the model's output that the errors of a plan's layers come to, without any repair.

        Errors of layers are taken for independent of each other; each counts by how far it moves the output
        (`measure_gains`). Without calibration data, all count alike.
        """
        return math.sqrt(sum(self._gain(layer.name) * (layer.option.error or 0.0) ** 2
                             for layer in plan.split if layer.option is not None))  # fmt: skip

    def _gain(self, name: str) -> float:
        return self.gains.get(name, 1.0 if not self.gains else 0.0)

    @cached_property
    def gains(self) -> dict[str, float]:
        """How far the model's output moves for an error in each layer's; empty where that cannot be told."""
        if self.batches is None:
            return {}
        names = [site.name for site in self.sites if site.splittable]
        with same_globals(), plain_arithmetic():
            return measure_gains(self.model, names, self.batches, self.forward, seed=self.seed)

    def apply(self, plan: Plan) -> M:
        """Convert as a plan says, perhaps an edited one, and repair where there are calibration data."""
        return self._repaired(self._rewritten(plan), plan)

    def _rewritten(self, plan: Plan) -> M:
        self._check_unchanged()
        metric = {} if _is_exact(plan) else self.marginals
        converted = apply_plan(self.model, plan, progress=self.progress, fits=self._fits(), marginals=metric)
        self._check_reached(converted)
        return converted

    def _repaired(self, converted: M, plan: Plan) -> M:
        if self.batches is not None and plan.split and not _is_exact(plan):
            refit(converted, self.model, self.batches, forward=self.forward, seed=self.seed, progress=self.progress)
        return converted

    def frontier(
        self, batches: Any = None, *, budgets: Sequence[Budget | float] = BUDGETS, kind: str = "params"
    ) -> Frontier:
        """Plan at many budgets and, given some batches, measure the drift of each conversion on them.

        With calibration data drift is measured twice: of the conversion as it comes, and once it is repaired.

        Args:
            batches: as for `compare`; without them only predicted errors are given.
            budgets: `Budget` objects, or fractions of `kind`.
            kind: what plain fractions are fractions of: "params", "macs" or "error".

        Budgets that cannot be met are left out and named in the notes.

        Raises:
            ValueError: no budgets, or none that can be met.
        """
        wanted = [each if isinstance(each, Budget) else Budget.of_kind(kind, each) for each in budgets]
        plans, notes = self._plans_and_notes(sorted(wanted, key=lambda budget: -budget.fraction))
        if not plans:
            raise ValueError("; ".join(notes) or "budgets is empty: give at least one")
        data = None if batches is None else checked_batches(batches)
        points = []
        for plan in track(plans, "Budgets", progress=self.progress):
            if data is None:
                points.append(planned_point(plan))
                continue
            converted = self._rewritten(plan)
            point = measured_point(plan, converted, self.model, data, self.forward)
            if self.batches is not None:
                repaired = self._repaired(converted, plan)
                before, point = point.drift, measured_point(plan, repaired, self.model, data, self.forward)
                point = replace(point, unrepaired=before)
            points.append(point)
        return Frontier(tuple(points), tuple(curve_of(menu) for menu in self.menus), tuple(notes))

    def _plans_and_notes(self, budgets: Iterable[Budget]) -> tuple[list[Plan], list[str]]:
        """A plan for each budget that can be met, and what is to be said about the others."""
        plans, notes = [], []
        for budget in budgets:
            try:
                plans.append(self.plan(budget))
            except ValueError as error:  # noqa: PERF203 - of a handful of budgets
                notes.append(str(error))
        return plans, notes

    def of_copy(self, model: nn.Module, example_inputs: Batch) -> Study[nn.Module]:
        """What this study knows, of a copy of the model that sees inputs of other shapes or layouts."""
        other: Study[nn.Module] = Study(
            model, example_inputs, forward=self.forward, forms=self.forms, skip=self.skip, bake=self.bake,
            linear=self.linear, seed=self.seed, progress=self.progress,
        )  # fmt: skip
        by_name = {site.name: site for site in other.sites}
        other.menus = [menu.at(by_name[menu.site.name]) for menu in self.menus]
        other.timed_menus = [menu.at(by_name[menu.site.name]) for menu in self.timed_menus]
        return other

    @property
    def params(self) -> int:
        """Parameters of the whole model."""
        return parameter_count(self.model)

    @property
    def macs(self) -> int | None:
        """MACs of the whole model per input; None without example inputs."""
        return self.trace.macs

    @property
    def title(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    def table(self) -> Table:
        """One row per convolution."""
        headings = ["layer", "kernel", "params", "MACs/input", "places", "followed by", "left alone because"]
        text = frozenset({"layer", "kernel", "followed by", "left alone because"})
        return Table(headings, [_cells(record) for record in self.records()], text)

    def summary(self) -> str:
        """How much of the model can be split."""
        split = [site.spec for site in self.sites if site.splittable and site.spec]
        weights = sum(spec.weight_params for spec in split)
        kind = noun(site.spec for site in self.sites)
        return (
            f"{len(split)} of {len(self.sites)} {kind}s can be split; they hold {count(weights)} of "
            f"{count(self.params)} parameters"
        )

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per convolution."""
        return [_record(site) for site in self.sites]

    def __repr__(self) -> str:
        return f"Study({self.title}: {self.summary()})"

    def _forms(self, of_one_rank: bool = False) -> list[Form]:
        return forms_named(self.forms, linear=self.linear, of_one_rank=of_one_rank)

    def _menus(self, rank: int | None, exact: bool) -> list[Menu]:
        if exact:
            return exact_menus(self.sites, self._forms())
        if rank is None:
            return self.menus
        forms = self._forms(of_one_rank=True)
        return find_menus(
            self.sites, forms=forms, rank=rank, marginals=self.marginals, seed=self.seed, progress=self.progress
        )

    def _check_reached(self, converted: nn.Module) -> None:
        """Warn of split layers that a model does not run: code may hold on to the original's, or pick by class."""
        if self.example_inputs is None:
            return
        unused = unused_layers(self.model, converted, self.example_inputs, self.forward)
        if unused:
            found = ", ".join(f"{name} ({after} of {before} calls)" for name, (before, after) in unused.items())
            warn(
                f"split layers that run less often than the layers they replace: {found}. A wrapped forward may hold "
                "on to the original's layers, or code may pick them by isinstance(layer, nn.Conv2d): leave them out "
                "with skip=, or convert the model before it is wrapped"
            )

    def _fits(self) -> dict[str, tuple[CP, ...]]:
        """Those behind the menus, if there are menus yet: for an exact plan or one from a file they are not needed."""
        return {menu.site.name: menu.fits for menu in self.__dict__.get("menus", ())}

    def _choose(self, menus: Sequence[Menu], budget: Budget | None) -> Allocation:
        if budget is None:
            return Allocation([closest_split(menu) for menu in menus])
        try:
            return allocate(menus, budget, model_params=self.params, model_macs=self.macs)
        except ValueError as error:
            more = "; ".join(self._what_else_could_be_split()) if budget.of == "model" else ""
            if more:
                raise ValueError(f"{error}; {more}") from error
            raise

    def _what_else_could_be_split(self) -> Iterator[str]:
        if any(site.reason == POINTWISE for site in self.sites):
            yield 'with "pw-pw" among forms=, 1x1 kernels can be split, too'
        if not self.linear and any(is_linear(module) for module in self.model.modules()):
            yield "with linear=True, linear layers can be split, too"

    def _timed(self, menus: Sequence[Menu], budget: Budget | None, prefer: str, stopwatch: Stopwatch) -> Plan:
        found = choose_by_time(
            self.model, self.example_inputs, menus, budget, prefer=prefer, stopwatch=stopwatch,
            model_params=self.params, model_macs=self.macs, forward=self.forward, progress=self.progress,
        )  # fmt: skip
        return self._plan(found.menus, found.chosen, budget, found.model_milliseconds, found.conditions)

    def _plan(
        self,
        menus: Sequence[Menu],
        chosen: Sequence[Option],
        budget: Budget | None,
        model_milliseconds: tuple[float, float] | None = None,
        conditions: Conditions | None = None,
        sites: Sequence[Site] | None = None,
    ) -> Plan:
        layers = planned_layers(sites or self.sites, menus, chosen, observed=self.trace.calls is not None)
        return Plan(layers, self.params, self.macs, budget, self.seed, model_milliseconds, conditions)

    def _check_unchanged(self) -> None:
        if _versions(self.model) != self._versions:
            raise ValueError(
                f"the weights of {self.title} have changed since it was studied (trained, or loaded anew): make a "
                "new study"
            )


def check_asked(budget: Budget | None, rank: int | None, exact: bool) -> list[str]:
    """Which of the three ways to say how far layers are split was taken, if any.

    Raises:
        ValueError: more than one.
    """
    given = (("budget=", budget is not None), ("rank=", rank is not None), ("exact=", exact))
    asked = [text for text, said in given if said]
    if len(asked) > 1:
        raise ValueError(f"give one of budget=, rank= and exact=, not {' and '.join(asked)}")
    return asked


def _is_exact(plan: Plan) -> bool:
    return all(layer.option is not None and layer.option.error == 0 for layer in plan.split)


def _versions(model: nn.Module) -> dict[int, int]:
    """How often each parameter was written to, as far as torch counts it."""
    counted = (p for p in model.parameters() if not isinstance(p, UninitializedParameter) and not p.is_inference())
    return {id(p): p._version for p in counted}


def _check_preference(prefer: str, timed: bool, budget: Budget | None, example_inputs: Batch) -> None:
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer={prefer!r}; want one of {', '.join(map(repr, PREFERENCES))}")
    if timed and example_inputs is None:
        asked = f'prefer="{prefer}"' if prefer == "speed" else repr(budget)
        raise ValueError(f"{asked} measures layers at the shapes they see: pass example_inputs")


def _nothing_found(model: nn.Module, linear: bool) -> str:
    if any(isinstance(module, SeparableConv) for module in model.modules()):
        return f"all layers of {type(model).__name__} that could be split are: the result is a plain copy"
    return (
        f"no convolution{' and no linear layer' * linear} found in {type(model).__name__}: the result is a plain copy"
    )


def _warn_of_reasons(title: str, sites: Sequence[Site]) -> None:
    """Say why nothing of a model can be split, if that is not what was asked for."""
    reasons = Counter(site.reason or "no form of it costs less" for site in sites)
    if set(reasons) == {SKIPPED}:
        return
    found = "; ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3))
    kind = noun(site.spec for site in sites)
    warn(f"no {kind} of {title} can be split, the result is a plain copy: {found}")


def _record(site: Site) -> dict[str, Any]:
    spec = site.spec
    macs = dense_option(site).macs if spec else None
    return {
        "layer": site.name,
        "kernel": "x".join(map(str, spec.weight_shape)) if spec else "",
        "params": spec.params if spec else None,
        "macs": macs,
        "places": site.places,
        "followed_by": site.followed_by,
        "reason": site.reason,
    }


def _cells(record: Mapping[str, Any]) -> list[str]:
    return [
        record["layer"], record["kernel"], count(record["params"]), count(record["macs"]), count(record["places"]),
        record["followed_by"], record["reason"],
    ]  # fmt: skip
