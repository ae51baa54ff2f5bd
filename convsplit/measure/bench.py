"""bench: dense against converted at several budgets, measured in turns on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convsplit.choose.budget import Budget
from convsplit.choose.options import Menu, find_options
from convsplit.choose.plan import Conditions, Plan, planned_layers
from convsplit.forms import FORMS
from convsplit.measure.deployment import for_inference
from convsplit.measure.speed import choose_by_time
from convsplit.measure.stopwatch import Stopwatch, with_noise
from convsplit.measure.timing import time_models
from convsplit.model.copies import deep_copy
from convsplit.model.graphs import Trace, trace
from convsplit.model.guards import same_globals
from convsplit.model.layout import channels_last
from convsplit.model.running import Batch, tensors_in
from convsplit.model.sites import Site, Skip, find_sites
from convsplit.progress import track
from convsplit.rewrite import apply_plan
from convsplit.spec import parameter_count
from convsplit.tables import Table, html_page_part, milliseconds, ratio, records_csv, times_faster

BUDGETS = (Budget(macs=0.5), Budget(macs=0.25))
LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class BenchRow:
    """One budget under some conditions. `macs` and `milliseconds` are of the whole model, dense and converted.

    `conv_macs` and `conv_milliseconds` are of the convolutions that can be split, the latter measured within the model
    (eager, not deployed): what budgets are fractions of.
    """

    budget: str
    batch: int
    conditions: Conditions
    compiled: bool
    split: int
    conv_macs: tuple[int, int]
    conv_milliseconds: tuple[float, float]
    macs: tuple[int, int]
    milliseconds: tuple[float, float]

    @property
    def speedup(self) -> float:
        """Dense milliseconds over converted ones."""
        return self.milliseconds[0] / self.milliseconds[1]

    @property
    def quotient(self) -> float:
        """The part of the promise that is kept: the speed-up over that of the whole model's MACs."""
        return self.speedup * self.macs[1] / self.macs[0]


@dataclass(frozen=True)
class Bench:
    """All rows; prints as a table."""

    model: str
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """One line per row."""
        headings = [
            "budget", "batch", "threads", "layout", "run", "split", "MACs of convs", "ms of convs", "MACs", "ms", "->",
            "faster", "of promised",
        ]  # fmt: skip
        return Table(headings, [_cells(row) for row in self.rows], frozenset({"budget", "layout", "run"}))

    def best(self) -> Iterator[tuple[BenchRow, float]]:
        """For each budget, batch, number of threads and way of running: the row of the fastest converted model, and
        its speed-up over the dense model in whichever layout that is fastest.
        """
        cases: dict[tuple[Any, ...], list[BenchRow]] = {}
        for row in self.rows:
            cases.setdefault((row.budget, row.batch, row.conditions.threads, row.compiled), []).append(row)
        for rows in cases.values():
            fastest = min(rows, key=lambda row: row.milliseconds[1])
            yield fastest, min(row.milliseconds[0] for row in rows) / fastest.milliseconds[1]

    def summary(self) -> str:
        """The best layouts against each other."""
        lines = [
            f"{row.budget}, batch {row.batch}, {_threads(row)}{', compiled' if row.compiled else ''}: {gain:.2f}x, "
            f"each model in its faster layout ({row.conditions.layout} for the converted one)"
            for row, gain in self.best()
        ]
        return "\n".join([*lines, *self.notes])

    def text(self, width: int | None = None) -> str:
        """Everything as plain text, for a terminal of some width."""
        return f"{self.model}\n{self.table().text(width)}\n\n{self.summary()}"

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return html_page_part(self.model, self.summary(), self.table())

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per row."""
        return [
            {
                "budget": row.budget, "batch": row.batch, **asdict(row.conditions), "compiled": row.compiled,
                "split": row.split, "conv_milliseconds_before": row.conv_milliseconds[0],
                "conv_milliseconds_after": row.conv_milliseconds[1],
                "macs_before": row.macs[0], "macs_after": row.macs[1],
                "milliseconds_before": row.milliseconds[0], "milliseconds_after": row.milliseconds[1],
                "speedup": row.speedup, "of_promised": row.quotient,
            }
            for row in self.rows
        ]  # fmt: skip

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        return f"### {self.model}\n\n{self.table().markdown()}\n\n{self.summary()}\n"

    def to_csv(self) -> str:
        """One line per row, plain numbers."""
        return records_csv(self.records())

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps({"model": self.model, "rows": self.records(), "notes": self.notes}, indent=1)


@same_globals()
def bench(
    model: nn.Module,
    example_inputs: Batch,
    *,
    budgets: Sequence[Budget] = BUDGETS,
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    compiled: bool = False,
    prefer: str = "speed",
    forms: str | Sequence[str] = tuple(FORMS),
    skip: Skip = (),
    deployed: bool = False,
    seconds: float = 20.0,
    progress: bool | None = None,
) -> Bench:
    """Measure what conversions at several budgets gain on this machine, before any factor is computed.

    Split layers are filled with random numbers, whose speed is that of fitted ones. For each batch size, number of
    threads and layout the choice is made anew by measurement, and both models are timed in turns.

    Args:
        model: the model; it is not changed.
        example_inputs: as for `convert`; rows of its tensors are repeated or left out for other batch sizes.
        budgets: what to measure.
        batches: numbers of images run at once.
        threads: numbers of CPU threads; by default one, and as many as torch uses now.
        layouts: "contiguous" and "channels_last".
        compiled: also measure both models after `torch.compile`.
        prefer: as for `convert`.
        forms: as for `convert`.
        skip: as for `convert`.
        deployed: run both models through `for_inference` first, which folds batch norm.
        seconds: for measuring the layers of each case, about; models take some seconds more.
        progress: show a progress bar; by default only on a terminal.

    Raises:
        ValueError: no convolution to split, inputs the model does not run on. Budgets that cannot be met are noted.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    >>> found = bench(model, torch.randn(1, 32, 24, 24), batches=[2], threads=[1], layouts=["contiguous"], seconds=1)
    >>> [row.batch for row in found.rows]
    [2, 2]
    """
    traced = trace(model, example_inputs)
    sites = find_sites(model, traced, skip=skip)
    forms = [forms] if isinstance(forms, str) else list(forms)
    menus = find_options(model, sites, forms=forms, progress=progress)
    if not menus:
        raise ValueError(f"{type(model).__name__} has no convolution that can be split: nothing to measure")
    all_threads = torch.get_num_threads()
    counts = sorted({1, all_threads}) if threads is None else list(threads)
    cases = [(batch, count, layout) for batch in batches for count in counts for layout in layouts]
    rows: list[BenchRow] = []
    notes: list[str] = []
    try:
        for batch, count, layout in track(cases, "Measuring", progress=progress):
            torch.set_num_threads(count)
            case = _Case.of(model, example_inputs, batch, layout, menus, skip)
            stopwatch = Stopwatch(seconds=seconds)
            for budget in budgets:
                try:
                    plan = case.plan(budget, prefer, stopwatch)
                except ValueError as error:
                    notes.append(f"batch {batch}, {count} threads, {layout}: {error}")
                    continue
                rows += case.measured(plan, deployed, compiled)
    finally:
        torch.set_num_threads(all_threads)
    return Bench(type(model).__name__, tuple(rows), tuple(notes))


@dataclass(frozen=True)
class _Case:
    """A model with inputs of some batch size, both in some layout, and the options of its layers at those shapes."""

    model: nn.Module
    inputs: Batch
    batch: int
    traced: Trace
    sites: list[Site]
    menus: list[Menu]

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Batch, batch: int, layout: str, menus: Sequence[Menu], skip: Skip
    ) -> _Case:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; there are {', '.join(map(repr, LAYOUTS))}")
        inputs = resized(example_inputs, batch)
        last = layout == "channels_last"
        inputs = channels_last(inputs) if last else tree_map(_contiguous, inputs)
        copied = deep_copy(model).eval()
        copied = copied.to(memory_format=torch.channels_last if last else torch.contiguous_format)
        traced = trace(copied, inputs)
        sites = find_sites(copied, traced, skip=skip)
        by_name = {site.name: site for site in sites}
        return cls(copied, inputs, batch, traced, sites, [menu.at(by_name[menu.site.name]) for menu in menus])

    def plan(self, budget: Budget, prefer: str, stopwatch: Stopwatch) -> Plan:
        params = parameter_count(self.model)
        found = choose_by_time(
            self.model, self.inputs, self.menus, budget, prefer=prefer, stopwatch=stopwatch, model_params=params,
            model_macs=self.traced.macs, progress=False,
        )  # fmt: skip
        layers = planned_layers(self.sites, found.menus, found.chosen, True)
        return Plan(layers, params, self.traced.macs, budget, 0, found.model_milliseconds, found.conditions)

    def measured(self, plan: Plan, deployed: bool, compiled: bool) -> Iterator[BenchRow]:
        converted = with_noise(apply_plan(self.model, plan, initialise=False, progress=False))
        pair = [for_inference(each) if deployed else each for each in (self.model, converted)]
        yield self._row(plan, pair, False)
        if compiled:
            ready: list[Any] = [torch.compile(each) for each in pair]
            yield self._row(plan, ready, True)
            torch.compiler.reset()

    def _row(self, plan: Plan, pair: Sequence[nn.Module], compiled: bool) -> BenchRow:
        before, after = time_models(pair, self.inputs)
        totals, conditions = plan.totals(), plan.conditions
        assert conditions is not None
        macs, times, whole = (
            (totals[f"{what}_before"] or 0, totals[f"{what}_after"] or 0)
            for what in ("macs", "milliseconds", "model_macs")
        )
        return BenchRow(
            repr(plan.budget), self.batch, conditions, compiled, len(plan.split), (int(macs[0]), int(macs[1])), times,
            (int(whole[0]), int(whole[1])), (before.total, after.total),
        )  # fmt: skip


def resized(inputs: Batch, batch: int) -> Batch:
    """The same inputs with so many rows: repeated, or the first ones."""

    def rows(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.dim():
            return tensor
        return tensor[torch.arange(batch, device=tensor.device) % len(tensor)]

    if not any(True for _ in tensors_in(inputs)):
        raise ValueError("example_inputs hold no tensor: there is nothing to run the model on")
    return tree_map(rows, inputs)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _threads(row: BenchRow) -> str:
    return f"{row.conditions.threads} thread{'s' * (row.conditions.threads != 1)}"


def _cells(row: BenchRow) -> list[str]:
    slow, fast = row.milliseconds
    return [
        row.budget, str(row.batch), str(row.conditions.threads), row.conditions.layout,
        "compiled" if row.compiled else "eager", str(row.split), ratio(row.conv_macs[1], row.conv_macs[0]),
        ratio(row.conv_milliseconds[1], row.conv_milliseconds[0]), ratio(row.macs[1], row.macs[0]),
        milliseconds(slow), milliseconds(fast), times_faster(slow, fast), f"{row.quotient:.2f}",
    ]  # fmt: skip
