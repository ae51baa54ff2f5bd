"""bench: dense against converted at several budgets, measured in turns on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convsplit.choose.plan import Conditions, Plan
from convsplit.measure.deployment import for_inference
from convsplit.measure.stopwatch import with_noise
from convsplit.measure.timing import time_models
from convsplit.model.copies import deep_copy
from convsplit.model.layout import channels_last, in_channels_last
from convsplit.model.running import Batch, Forward, tensors_in
from convsplit.rewrite import apply_plan
from convsplit.tables import Table, Tabular, milliseconds, ratio, times_faster

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class BenchRow:
    """One budget under some conditions. `macs` and `milliseconds` are of the whole model, dense and converted.

    `conv_macs` and `conv_milliseconds` are of the convolutions that can be split, the latter measured within the model
    (eager, not deployed): what budgets are fractions of.
    """

    budget: str
    batch_size: int
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
class Bench(Tabular):
    """All rows; prints as a table."""

    model: str
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The model's class."""
        return self.model

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
            cases.setdefault((row.budget, row.batch_size, row.conditions.threads, row.compiled), []).append(row)
        for rows in cases.values():
            fastest = min(rows, key=lambda row: row.milliseconds[1])
            yield fastest, min(row.milliseconds[0] for row in rows) / fastest.milliseconds[1]

    def summary(self) -> str:
        """The best layouts against each other."""
        lines = [
            f"{row.budget}, batch {row.batch_size}, {_threads(row)}{', compiled' if row.compiled else ''}: "
            f"{gain:.2f}x, each model in its faster layout ({row.conditions.layout} for the converted one)"
            for row, gain in self.best()
        ]
        return "\n".join([*lines, *self.notes])

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per row."""
        return [
            {
                "budget": row.budget, "batch_size": row.batch_size, **asdict(row.conditions), "compiled": row.compiled,
                "split": row.split, "conv_milliseconds_before": row.conv_milliseconds[0],
                "conv_milliseconds_after": row.conv_milliseconds[1],
                "macs_before": row.macs[0], "macs_after": row.macs[1],
                "milliseconds_before": row.milliseconds[0], "milliseconds_after": row.milliseconds[1],
                "speedup": row.speedup, "of_promised": row.quotient,
            }
            for row in self.rows
        ]  # fmt: skip

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps({"model": self.model, "rows": self.records(), "notes": self.notes}, indent=1)


@dataclass(frozen=True)
class Case:
    """A model and inputs of some batch size, both in some memory layout, on so many threads."""

    model: nn.Module
    inputs: Batch
    batch: int
    threads: int
    layout: str

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.threads} thread{'s' * (self.threads != 1)}, {self.layout}"

    def measured(
        self, plan: Plan, *, forward: Forward | None = None, deployed: bool = False, compiled: bool = False
    ) -> Iterator[BenchRow]:
        """Dense against converted as a timed plan says, in turns; split layers get random numbers."""
        converted = with_noise(apply_plan(self.model, plan, initialise=False, progress=False))
        pair = [for_inference(each) if deployed else each for each in (self.model, converted)]
        yield self._row(plan, pair, forward, False)
        if compiled:
            ready: list[Any] = [torch.compile(each) for each in pair]
            yield self._row(plan, ready, forward, True)
            torch.compiler.reset()

    def _row(self, plan: Plan, pair: Sequence[nn.Module], forward: Forward | None, compiled: bool) -> BenchRow:
        before, after = time_models(pair, self.inputs, forward=forward)
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


def cases_of(
    batch_sizes: Sequence[int], threads: Sequence[int] | None, layouts: Sequence[str]
) -> list[tuple[int, int, str]]:
    """Batch size, threads and layout of every case; by default one thread, and as many as torch uses now.

    Raises:
        ValueError: an unknown layout.
    """
    for layout in layouts:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; there are {', '.join(map(repr, LAYOUTS))}")
    counts = sorted({1, torch.get_num_threads()}) if threads is None else list(threads)
    return [(batch, count, layout) for batch in batch_sizes for count in counts for layout in layouts]


def case_of(model: nn.Module, example_inputs: Batch, batch: int, threads: int, layout: str) -> Case:
    """A copy of the model and inputs of this batch size, in this layout."""
    inputs = resized(example_inputs, batch)
    last = layout == "channels_last"
    inputs = channels_last(inputs) if last else tree_map(_contiguous, inputs)
    copied = deep_copy(model)
    copied.eval()  # not chained: a model's own train() may return nothing
    copied = in_channels_last(copied) if last else copied.to(memory_format=torch.contiguous_format)
    return Case(copied, inputs, batch, threads, layout)


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
        row.budget, str(row.batch_size), str(row.conditions.threads), row.conditions.layout,
        "compiled" if row.compiled else "eager", str(row.split), ratio(row.conv_macs[1], row.conv_macs[0]),
        ratio(row.conv_milliseconds[1], row.conv_milliseconds[0]), ratio(row.macs[1], row.macs[0]),
        milliseconds(slow), milliseconds(fast), times_faster(slow, fast), f"{row.quotient:.2f}",
    ]  # fmt: skip
