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
from convsplit.runtimes import Runtime, runtime_of
from convsplit.runtimes.base import Prepare
from convsplit.tables import Table, Tabular, milliseconds, ratio, times_faster

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class BenchRow:
    """One budget under some conditions. `macs` and `milliseconds` are of the whole model, dense and converted.

    `conv_macs` and `conv_milliseconds` are of the convolutions that can be split, the latter measured within the model
    (not deployed), where the runtime lets anybody look inside: what budgets are fractions of.
    """

    budget: str
    batch_size: int
    conditions: Conditions
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
            "budget", "batch", "runtime", "threads", "layout", "split", "MACs of convs", "ms of convs", "MACs", "ms",
            "->", "faster", "of promised",
        ]  # fmt: skip
        return Table(headings, [_cells(row) for row in self.rows], frozenset({"budget", "runtime", "layout"}))

    def best(self) -> Iterator[tuple[BenchRow, float]]:
        """For each budget, batch, runtime and number of threads: the row of the fastest converted model, and its
        speed-up over the dense model in whichever layout that is fastest.
        """
        cases: dict[tuple[Any, ...], list[BenchRow]] = {}
        for row in self.rows:
            where = row.conditions.runtime, row.conditions.threads
            cases.setdefault((row.budget, row.batch_size, *where), []).append(row)
        for rows in cases.values():
            fastest = min(rows, key=lambda row: row.milliseconds[1])
            yield fastest, min(row.milliseconds[0] for row in rows) / fastest.milliseconds[1]

    def summary(self) -> str:
        """The best layouts against each other, and what several threads are worth to both models."""
        lines = [
            f"{row.budget}, batch {row.batch_size}, {row.conditions.runtime}, {_threads(row)}: {gain:.2f}x, each model "
            f"in its faster layout ({row.conditions.layout} for the converted one)"
            for row, gain in self.best()
        ]
        return "\n".join([*lines, *self._threads_compared(), *self._versions(), *self.notes])

    def _threads_compared(self) -> Iterator[str]:
        """Short stages gain less by another thread than long ones, which a speed-up alone does not tell."""
        cases: dict[tuple[Any, ...], list[BenchRow]] = {}
        for row in self.rows:
            cases.setdefault((row.budget, row.batch_size, row.conditions.runtime, row.conditions.layout), []).append(
                row
            )
        for (budget, batch, runtime, layout), rows in cases.items():
            fewest, most = (pick(rows, key=lambda row: row.conditions.threads) for pick in (min, max))
            if fewest.conditions.threads < most.conditions.threads:
                dense, converted = (fewest.milliseconds[side] / most.milliseconds[side] for side in (0, 1))
                yield (
                    f"{budget}, batch {batch}, {runtime}, {layout}: {_threads(most)} instead of "
                    f"{fewest.conditions.threads} make the dense model {dense:.2f}x as fast, the converted one "
                    f"{converted:.2f}x"
                )

    def _versions(self) -> Iterator[str]:
        found = dict.fromkeys(
            (row.conditions.runtime, row.conditions.version, row.conditions.dtype) for row in self.rows
        )
        for runtime, version, dtype in found:
            yield f"{runtime} {version}".strip() + f", {dtype}"

    def records(self) -> list[dict[str, Any]]:
        """One dict of plain values per row."""
        return [
            {
                "budget": row.budget, "batch_size": row.batch_size, **asdict(row.conditions),
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
    """A model and inputs of some batch size, both in some memory layout, for a runtime on so many threads."""

    model: nn.Module
    inputs: Batch
    batch: int
    runtime: str
    threads: int
    layout: str

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.runtime}, {self.threads} thread{'s' * (self.threads != 1)}, {self.layout}"

    def measured(
        self, plan: Plan, runtime: Runtime, *, forward: Forward | None = None, deployed: bool = False
    ) -> BenchRow:
        """Dense against converted as a timed plan says, in turns; split layers get random numbers."""
        converted = with_noise(apply_plan(self.model, plan, initialise=False, progress=False))
        pair = [for_inference(each) if deployed else each for each in (self.model, converted)]
        before, after = time_models(pair, self.inputs, forward=forward, runtime=runtime)
        if runtime.name.startswith("torch"):
            torch.compiler.reset()  # code compiled for models that are gone
        totals, conditions = plan.totals(), plan.conditions
        assert conditions is not None
        macs, times, whole = (
            (totals[f"{what}_before"] or 0, totals[f"{what}_after"] or 0)
            for what in ("macs", "milliseconds", "model_macs")
        )
        return BenchRow(
            repr(plan.budget), self.batch, conditions, len(plan.split), (int(macs[0]), int(macs[1])), times,
            (int(whole[0]), int(whole[1])), (before.total, after.total),
        )  # fmt: skip


Where = tuple[int, Runtime, int, str]  # batch size, runtime, threads, layout


def cases_of(
    batch_sizes: Sequence[int], runtimes: Sequence[str | Runtime | Prepare], threads: Sequence[int] | None,
    layouts: Sequence[str],
) -> list[Where]:  # fmt: skip
    """All cases; by default one thread, and as many as torch uses now. Runtimes with a layout of their own have one.

    Raises:
        ValueError: an unknown layout or runtime.
        ImportError: a runtime that is not installed.
    """
    for layout in layouts:
        if layout not in LAYOUTS:
            raise ValueError(f"unknown layout {layout!r}; there are {', '.join(map(repr, LAYOUTS))}")
    counts = sorted({1, torch.get_num_threads()}) if threads is None else list(threads)
    return [
        (batch, runtime, count, layout)
        for batch in batch_sizes
        for runtime in map(runtime_of, runtimes)
        for count in counts
        for layout in (layouts[:1] if runtime.layout else layouts)
    ]


def case_of(model: nn.Module, example_inputs: Batch, where: Where) -> Case:
    """A copy of the model and inputs of this batch size, in this layout."""
    batch, runtime, threads, layout = where
    inputs = resized(example_inputs, batch)
    last = layout == "channels_last"
    inputs = channels_last(inputs) if last else tree_map(_contiguous, inputs)
    copied = deep_copy(model)
    copied.eval()  # not chained: a model's own train() may return nothing
    copied = in_channels_last(copied) if last else copied.to(memory_format=torch.contiguous_format)
    return Case(copied, inputs, batch, runtime.name, threads, layout)


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
        row.budget, str(row.batch_size), row.conditions.runtime, str(row.conditions.threads), row.conditions.layout,
        str(row.split), ratio(row.conv_macs[1], row.conv_macs[0]),
        ratio(row.conv_milliseconds[1], row.conv_milliseconds[0]), ratio(row.macs[1], row.macs[0]),
        milliseconds(slow), milliseconds(fast), times_faster(slow, fast), f"{row.quotient:.2f}",
    ]  # fmt: skip
