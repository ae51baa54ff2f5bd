"""How much of its quality a conversion loses, on inputs that neither its choice nor its repair has seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.choose.budget import Budget
from convsplit.model.copies import scratch_copy
from convsplit.model.running import Batch, Forward, quiet_run, run_or_explain
from convsplit.model.values import class_scores, count_inputs, tensors_in

Z = 1.96  # of 95 % in the normal distribution


@dataclass(frozen=True)
class Quality:
    """What was measured of one conversion: its drift, and the loss that its budget is about.

    `loss` is the relative drift, the share of inputs with another top-1 class, or how much worse the metric is; `low`
    and `high` are the ends of its 95 % interval, None where none can be told. `value` is the metric itself.
    """

    drift: float
    loss: float
    low: float | None = None
    high: float | None = None
    value: float | None = None


@dataclass
class HeldOut:
    """A model on held-out inputs, run once, beside which conversions are measured.

    `alike` are further inputs of the same kind, which conversions may have seen: by the original's scores they tell,
    too, how many inputs are close to another class.

    Raises:
        ValueError: a budget of agreement where no output is known to be class scores, a metric that is no number.
    """

    model: nn.Module
    batches: Sequence[Batch]
    forward: Forward | None
    budget: Budget
    alike: Sequence[Batch] = ()
    outputs: list[Any] = field(init=False)
    inputs: list[int] = field(init=False)
    scores: list[Tensor] = field(init=False)  # [inputs, classes] of each batch
    further: list[Tensor] = field(init=False)  # those of the inputs alike
    reference: float = field(init=False, default=0.0)  # the original's metric

    def __post_init__(self) -> None:
        self.outputs = self._run(self.model, self.batches)
        self.inputs = [count_inputs(batch) for batch in self.batches]
        self.scores = _scores(self.outputs, self.inputs)
        self.further = []
        if self.budget.kind == "agreement" and len(self.scores) < len(self.outputs):
            raise ValueError(
                f"{self.budget!r}: no output of {type(self.model).__name__} is known to be class scores, of shape "
                "(inputs, classes): ask for drift=, or for a metric= of your own"
            )
        if self.budget.kind == "agreement":
            self.further = _scores(self._run(self.model, self.alike), map(count_inputs, self.alike))
        if self.budget.kind == "metric":
            self.reference = self._metric(self.model)

    @property
    def count(self) -> int:
        """Inputs held out."""
        return sum(self.inputs)

    @property
    def limit(self) -> float:
        """The loss that the budget allows."""
        if self.budget.kind == "agreement":
            return 1 - self.budget.fraction
        return self.budget.fraction * (abs(self.reference) if self.budget.relative else 1.0)

    def measure(self, converted: nn.Module) -> Quality:
        """Run a conversion on the same inputs."""
        after = self._run(converted, self.batches)
        error, size = _energies(self.outputs, after, self.inputs)
        drift = math.sqrt(float(error.sum() / size.sum())) if float(size.sum()) else float(error.sum() > 0)
        if self.budget.kind == "drift":
            return Quality(drift, drift, *_ratio_interval(error, size))
        if self.budget.kind == "agreement":
            return Quality(drift, *self._disagreement(after))
        value = self._metric(converted)
        loss = (value - self.reference) * (1 if self.budget.lower_is_better else -1)
        return Quality(drift, math.inf if math.isnan(loss) else loss, value=value)

    def expected(self, drift: float) -> float:
        """The loss at a drift, roughly: of classes by how far the best score is ahead, with errors like noise.

        With the best score ahead by m of the next, and errors of variance s^2 in each, the next one overtakes with
        probability Phi(-m / (s sqrt 2)).
        """
        return self._expected(drift, self.scores)

    def expected_of_all(self, drift: float) -> float:
        """The same of these inputs and those alike: a loss of as many would be nearer to it than one of the few."""
        return self._expected(drift, [*self.scores, *self.further])

    def _expected(self, drift: float, scores: Sequence[Tensor]) -> float:
        if self.budget.kind != "agreement":
            return drift
        y = torch.cat(list(scores)).double()
        best = y.topk(2, dim=1).values
        noise = drift * y.square().mean().sqrt().clamp_min(1e-30)
        return float(torch.special.ndtr((best[:, 1] - best[:, 0]) / (math.sqrt(2) * noise)).mean())

    def _disagreement(self, after: Sequence[Any]) -> tuple[float, float, float]:
        others = [class_scores(output, n) for output, n in zip(after, self.inputs, strict=True)]
        changed = 0
        for y, z in zip(self.scores, others, strict=True):
            known = z is not None and z.shape == y.shape
            changed += int((y.argmax(1) != z.argmax(1)).sum()) if known and z is not None else len(y)
        total = sum(map(len, self.scores))
        return changed / total, *wilson(changed, total)

    def _metric(self, model: nn.Module) -> float:
        assert self.budget.metric is not None
        value: Any = self.budget.metric(scratch_copy(model))
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metric returned {value!r}; want a number") from error

    def _run(self, model: nn.Module, batches: Sequence[Batch]) -> list[Any]:
        """The outputs for all batches; where a model draws random numbers, the same ones every time."""
        copied, outputs = scratch_copy(model), []
        with quiet_run(copied):
            for index, batch in enumerate(batches):
                torch.manual_seed(index)
                outputs.append(run_or_explain(copied, batch, self.forward))
        return outputs


def _scores(outputs: Sequence[Any], inputs: Iterable[int]) -> list[Tensor]:
    """Those outputs that are class scores."""
    found = (class_scores(output, n) for output, n in zip(outputs, inputs, strict=True))
    return [each for each in found if each is not None]


def wilson(changed: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share, of so many of a total (Wilson, 1927).

    >>> [round(end, 3) for end in wilson(2, 100)]
    [0.006, 0.07]
    """
    share, z = changed / total, Z * Z / total
    middle, half = share + z / 2, Z * math.sqrt(share * (1 - share) / total + z / (4 * total))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def inputs_to_tell(loss: float, limit: float) -> int:
    """How many inputs make the 95 % interval of a share as narrow as its distance from a limit."""
    share = min(max(loss, 1e-4), 1 - 1e-4)
    return math.ceil(Z * Z * share * (1 - share) / max(abs(loss - limit), 1e-4) ** 2)


def inputs_to_narrow(inputs: int, half: float, distance: float) -> int:
    """How many inputs make a 95 % interval, half so wide with these many, no wider than a distance.

    Means of inputs drawn at random come closer with the square root of their number.

    >>> inputs_to_narrow(100, half=0.02, distance=0.01)
    400
    """
    return math.ceil(inputs * (half / max(distance, half / 100)) ** 2)


def _energies(before: Sequence[Any], after: Sequence[Any], inputs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """|converted - original|^2 and |original|^2 of each input, or of each batch where outputs do not tell them apart.

    Where both give the same infinity nothing has moved; where the original gives NaN or another infinity nothing can be
    told; where the converted model alone does, it has moved without end.
    """
    errors, sizes = [], []
    for y_all, z_all, n in zip(before, after, inputs, strict=True):
        pairs = list(zip(tensors_in(y_all), tensors_in(z_all), strict=False))
        pairs = [(y, z) for y, z in pairs if y.is_floating_point() or y.is_complex()]
        rows = n if all(y.dim() and y.shape[0] == n for y, _ in pairs) else 1
        error, size = torch.zeros(2, rows, dtype=torch.float64, device="cpu")
        for y, z in pairs:
            if y.shape != z.shape:
                error += math.inf
                continue
            y, z = _rows(y, rows), _rows(z, rows)
            known = y.isfinite()
            moved = torch.where(known, (z - y).abs().nan_to_num(nan=math.inf, posinf=math.inf), 0.0)
            error += moved.square().sum(1)
            size += torch.where(known, y, 0.0).square().sum(1)
        errors.append(error)
        sizes.append(size)
    return torch.cat(errors), torch.cat(sizes)


def _rows(tensor: Tensor, rows: int) -> Tensor:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return plain.detach().to("cpu", torch.float64).reshape(rows, -1)


def _ratio_interval(error: Tensor, size: Tensor) -> tuple[float | None, float | None]:
    """The 95 % interval of sqrt(sum error / sum size) over inputs drawn at random, by linearisation of the ratio."""
    n, total = len(error), float(size.sum())
    if n < 2 or not total or not bool(error.isfinite().all()):
        return None, None
    ratio = float(error.sum()) / total
    spread = Z * math.sqrt(n / (n - 1) * float((error - ratio * size).square().sum())) / total
    return math.sqrt(max(0.0, ratio - spread)), math.sqrt(ratio + spread)
