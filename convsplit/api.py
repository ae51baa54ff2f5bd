"""The front doors: each makes a study and asks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from convsplit.choose.budget import Budget
from convsplit.choose.plan import Plan
from convsplit.finetune.distillation import distill
from convsplit.finetune.reconstruction import reconstruct
from convsplit.measure.bench import LAYOUTS, Bench, BenchRow, case_of, cases_of
from convsplit.measure.stopwatch import Stopwatch
from convsplit.model.guards import same_globals
from convsplit.model.running import Batch
from convsplit.progress import track
from convsplit.report.curves import Frontier
from convsplit.runtimes import Runtime
from convsplit.runtimes.base import Prepare
from convsplit.searches import Finetune
from convsplit.studies import BUDGETS, Study, StudyOptions, check_asked, checked_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

M = TypeVar("M", bound=nn.Module)

THEN: dict[str, Callable[..., Any]] = {"reconstruct": reconstruct, "distill": distill}


def study(model: M, example_inputs: Batch = None, **options: Unpack[StudyOptions]) -> Study[M]:
    """Find out what can become of a model, once, and then ask for plans and conversions.

    Args:
        model: any module. It is never changed; while the study is used, neither should anybody else change it.
        example_inputs: what the model is called with once.
        **options: `calibration`, `forward`, `forms`, `skip`, `bake`, `linear`, `seed` and `progress`: see
            `convsplit.Study`.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> known = convsplit.study(model, forms="dw-pw")
    >>> [len(known.plan(convsplit.Budget(params=kept)).split) for kept in (1.0, 0.3)]
    [0, 2]
    """
    return Study(model, example_inputs, **checked_options(study, options))


def convert(
    model: M,
    example_inputs: Batch = None,
    *,
    budget: Budget | None = None,
    rank: int | None = None,
    exact: bool = False,
    prefer: str = "accuracy",
    stopwatch: Stopwatch | None = None,
    then: str | None = None,
    seconds: float | None = None,
    **options: Unpack[StudyOptions],
) -> M:
    """Replace the standard convolutions of a trained model by depthwise-separable ones.

    Args:
        model: any module. It is never changed.
        example_inputs: what the model is called with once: a tensor, a tuple of positional arguments or a dict of
            keyword arguments. They give the shapes, so MACs are known and no layer gets more of them.
        budget: what may be kept; half the parameters of the splittable convolutions by default. Or what may be lost
            (`Budget(drift=...)`, `agreement=`, `metric=`): a handful of conversions are then measured on a third of the
            calibration inputs, held out, and the cheapest good enough is returned; `study(...).search` shows them all.
        rank: instead, the same rank for every layer: the depth multiplier of dw-pw and pw-dw (those two are chosen
            from unless `forms` says otherwise) or, with `forms="pw-dw-pw"`, the CP rank.
        exact: instead, an exact rewriting of every layer, whatever that costs.
        prefer: "speed" keeps every layer dense for which no option is measured faster on this machine, at the shapes
            of `example_inputs`; "accuracy" goes by the budget alone.
        stopwatch: how long to measure, and whether inference or training; for budgets of latency and `prefer="speed"`.
            One stopwatch given to several calls measures equal layers once.
        then: go on with "reconstruct" or "distill", on the calibration inputs.
        seconds: how long that may take, about.
        calibration: a few hundred unlabelled inputs, as batches (an iterable, read once, of what `example_inputs` may
            be): ranks are then chosen by the error of each layer's output, and the result is repaired by `refit`.
        forward: how to run a model on a batch or on `example_inputs`, such as `lambda model, batch: model(batch[0])`.
        forms: which of "dw-pw", "pw-dw" and "pw-dw-pw" to choose from, layer by layer; all by default. With "pw-pw"
            among them 1x1 kernels are split, too.
        skip: layers to leave alone: names, glob patterns, or a predicate `(name, module) -> bool`.
        bake: also split layers whose weight is computed at every call (parametrizations, weight_norm, spectral_norm,
            pruning masks, timm's StdConv2d), by splitting the weight that runs in eval mode for good.
        linear: also split linear layers into two of lower rank, whatever `forms` says; they then count as splittable.
        seed: fixes the start of CP; the same seed gives the same result (choices by measured time may differ).
        progress: show progress bars; by default only on a terminal.

    Returns:
        a deep copy of the model's own class, split layers under their old names.

    Raises:
        TypeError: not a module, or one that cannot be deep-copied.
        ValueError: a budget that cannot be met (names the smallest that can, or how near it came and what would help),
            an unknown form, a bad rank, example inputs that do not run (names the module and the shapes), a `skip` that
            matches nothing, `then` without calibration inputs.

    For several budgets of one model, make a `study` and ask it: what does not depend on the budget is done once.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> smaller = convsplit.convert(model, budget=convsplit.Budget(params=0.4))
    >>> sum(p.numel() for p in smaller.parameters()) < 0.42 * sum(p.numel() for p in model.parameters())
    True
    """
    if then is None and seconds is not None:
        raise ValueError(f"seconds={seconds:g} is for fine-tuning: say then=, one of {', '.join(map(repr, THEN))}")
    known = Study(model, example_inputs, **checked_options(convert, options))
    if then is None:
        return known.convert(budget, rank=rank, exact=exact, prefer=prefer, stopwatch=stopwatch)
    finetune = _finetune(then, known, seconds)
    if budget is not None and budget.of_quality:
        check_asked(budget, rank, exact)
        found = known.search(budget, then=finetune, prefer=prefer, stopwatch=stopwatch).checked()
        return cast("M", found.model)
    converted = known.convert(budget, rank=rank, exact=exact, prefer=prefer, stopwatch=stopwatch)
    finetune(converted, model, known.batches)
    return converted


def _finetune(then: str, known: Study[Any], seconds: float | None) -> Finetune:
    """What is done to a converted model after its repair."""
    if then not in THEN:
        raise ValueError(f"then={then!r}; want one of {', '.join(map(repr, THEN))}")
    if known.batches is None:
        raise ValueError(f"then={then!r} works on inputs: give calibration=, some hundred unlabelled ones")

    def finetune(converted: nn.Module, original: nn.Module, batches: Any) -> None:
        THEN[then](
            converted, original, batches, forward=known.forward, seconds=seconds, seed=known.seed,
            progress=known.progress,
        )  # fmt: skip

    finetune.__name__ = then
    return finetune


def make_plan(
    model: nn.Module,
    example_inputs: Batch = None,
    *,
    budget: Budget | None = None,
    rank: int | None = None,
    exact: bool = False,
    prefer: str = "accuracy",
    stopwatch: Stopwatch | None = None,
    **options: Unpack[StudyOptions],
) -> Plan:
    """Decide what becomes of every convolution, without converting anything. Arguments as for `convert`.

    >>> import convsplit
    >>> plan = convsplit.make_plan(nn.Sequential(nn.Conv2d(16, 32, 3)), rank=1, forms="dw-pw")
    >>> plan.layers[0].params
    (4640, 688)
    """
    known = Study(model, example_inputs, **checked_options(make_plan, options))
    return known.plan(budget, rank=rank, exact=exact, prefer=prefer, stopwatch=stopwatch)


def frontier(
    model: nn.Module,
    example_inputs: Batch = None,
    batches: Any = None,
    *,
    budgets: Sequence[Budget | float] = BUDGETS,
    kind: str = "params",
    **options: Unpack[StudyOptions],
) -> Frontier:
    """Plan a model at many budgets, and measure the drift of each.

    The options of the layers are worked out once; each budget then costs one allocation and, where drift is measured,
    one conversion and one comparison.

    Args:
        model: the trained model; it is not changed.
        example_inputs: as for `convert`; needed for budgets of MACs.
        batches: measure drift on these, as in `compare`; without them only predicted errors are given.
        budgets: `Budget` objects, or fractions of `kind`.
        kind: what plain fractions are fractions of: "params", "macs" or "error".
        **options: as for `study`; with `calibration`, conversions are repaired before they are measured.

    Budgets that cannot be met are left out and named in the notes.

    Raises:
        ValueError: no budgets, or none that can be met.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    >>> curve = convsplit.frontier(model, batches=torch.randn(2, 16, 8, 8), budgets=(0.75, 0.5, 0.25), forms="dw-pw")
    >>> [point.drift < 1 for point in curve.points]
    [True, True, True]
    """
    known = Study(model, example_inputs, **checked_options(frontier, options))
    return known.frontier(batches, budgets=budgets, kind=kind)


@same_globals()
def bench(
    model: nn.Module,
    example_inputs: Batch,
    *,
    budgets: Sequence[Budget] = (Budget(macs=0.5), Budget(macs=0.25)),
    batch_sizes: Sequence[int] = (1, 8),
    runtimes: Sequence[str | Runtime | Prepare] = ("torch",),
    threads: Sequence[int] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    deployed: bool = False,
    prefer: str = "speed",
    seconds: float = 20.0,
    **options: Unpack[StudyOptions],
) -> Bench:
    """Measure what conversions at several budgets gain on this machine, before any factor is computed.

    Split layers are filled with random numbers, whose speed is that of fitted ones. For each batch size, runtime,
    number of threads and layout the choice is made again by measurement, and both models are timed in turns.

    Args:
        model: the model; it is not changed.
        example_inputs: as for `convert`; rows of its tensors are repeated or left out for other batch sizes.
        budgets: what to measure.
        batch_sizes: numbers of images run at once.
        runtimes: where to run both, side by side: names and functions as for `Stopwatch`.
        threads: numbers of CPU threads; by default one, and as many as torch uses now.
        layouts: "contiguous" and "channels_last"; runtimes other than PyTorch have their own.
        deployed: run both models through `for_inference` first, which folds batch norm. ONNX Runtime and OpenVINO
            always get them like that.
        prefer: as for `convert`.
        seconds: roughly how long to measure the layers of each case; models take a few seconds more.
        **options: as for `study`.

    Raises:
        ValueError: no convolution to split, inputs the model does not run on. Budgets that cannot be met are noted.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    >>> images = torch.randn(1, 32, 24, 24)
    >>> found = convsplit.bench(model, images, batch_sizes=[2], threads=[1], layouts=["contiguous"], seconds=1)
    >>> [row.batch_size for row in found.rows]
    [2, 2]
    """
    known: Study[nn.Module] = Study(model, example_inputs, **checked_options(bench, options))
    if not known.menus:
        raise ValueError(f"{known.title} has no layer that can be split: nothing to measure")
    rows: list[BenchRow] = []
    notes: list[str] = []
    for where in track(cases_of(batch_sizes, runtimes, threads, layouts), "Measuring", progress=known.progress):
        case, runtime = case_of(model, known.example_inputs, where), where[1]
        torch.set_num_threads(case.threads)
        here, stopwatch = known.of_copy(case.model, case.inputs), Stopwatch(seconds=seconds, runtime=runtime)
        for budget in budgets:
            try:
                plan = here.timed_plan(budget, prefer=prefer, stopwatch=stopwatch)
            except ValueError as error:
                notes.append(f"{case}: {error}")
                continue
            rows.append(case.measured(plan, runtime, forward=known.forward, deployed=deployed))
    return Bench(known.title, tuple(rows), tuple(notes))
