"""The whole story on one page: model -> trace -> sites -> options -> plan -> converted model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from convsplit.choose.allocation import allocate
from convsplit.choose.budget import Budget
from convsplit.choose.options import find_options
from convsplit.choose.plan import Plan, planned_layers
from convsplit.data.batches import checked_batches
from convsplit.data.moments import Marginals, measure_marginals
from convsplit.forms import FORMS
from convsplit.kinds import Equivalent, equivalent
from convsplit.layers.separable import SeparableConv2d
from convsplit.measure.speed import PREFERENCES, choose_by_time, closest_split
from convsplit.measure.stopwatch import Stopwatch
from convsplit.model.copies import scratch_copy
from convsplit.model.graphs import trace
from convsplit.model.guards import plain_arithmetic, same_globals
from convsplit.model.running import Batch, Forward
from convsplit.model.sites import Site, Skip, find_sites
from convsplit.progress import ConversionWarning
from convsplit.repair.refitting import refit
from convsplit.rewrite import apply_plan
from convsplit.spec import parameter_count

M = TypeVar("M", bound=nn.Module)


def convert(
    model: M,
    example_inputs: Batch = None,
    *,
    budget: Budget | None = None,
    rank: int | str | None = None,
    forms: str | Sequence[str] = tuple(FORMS),
    skip: Skip = (),
    bake: bool = False,
    calibration: Any = None,
    forward: Forward | None = None,
    prefer: str = "accuracy",
    stopwatch: Stopwatch | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> M:
    """Replace the standard convolutions of a trained model by depthwise-separable ones.

    Args:
        model: any module. It is never changed.
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments or a dict of
            keyword arguments. They tell the shapes, so MACs are known and no layer gets more of them.
        budget: what may be kept; half the parameters of the splittable convolutions if neither this nor `rank`.
        rank: instead of a budget, the same for every layer: the depth multiplier of dw-pw and pw-dw, the CP rank
            of pw-dw-pw, or "full" for an exact rewriting (whatever it costs).
        forms: which of "dw-pw", "pw-dw" and "pw-dw-pw" to choose from, layer by layer.
        skip: layers to leave alone: names, glob patterns, or a predicate `(name, module) -> bool`.
        bake: also split layers whose weight is computed at every call (parametrizations, weight_norm, spectral_norm,
            pruning masks, timm's StdConv2d), by splitting the weight that runs in eval mode for good.
        calibration: some hundred unlabelled inputs (an iterable, read once, of what `example_inputs` may be): ranks
            are then chosen by the error of each layer's output, and the result is repaired by `refit`.
        forward: how to run a model on what `calibration` yields, such as `lambda model, batch: model(batch[0])`.
        prefer: "speed" keeps every layer dense for which no option is measured faster on this machine, at the shapes
            of `example_inputs`; "accuracy" goes by the budget alone.
        stopwatch: how long to measure, and whether inference or training; for budgets of latency and `prefer="speed"`.
            One stopwatch given to several calls measures equal layers once.
        seed: fixes the start of CP; the same seed gives the same result (choices by measured time may differ).
        progress: show a progress bar; by default only on a terminal.

    Returns:
        a deep copy of the model's own class, split layers under their old names.

    Raises:
        TypeError: not a module, or one that cannot be deep-copied.
        ValueError: a budget that cannot be met (names the smallest that can), an unknown form, a bad rank, example
            inputs that do not run (names the module and the shapes), a `skip` that matches nothing.

    >>> import convsplit
    >>> model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
    >>> smaller = convsplit.convert(model, budget=convsplit.Budget(params=0.4))
    >>> sum(p.numel() for p in smaller.parameters()) < 0.42 * sum(p.numel() for p in model.parameters())
    True
    """
    batches = None if calibration is None else checked_batches(calibration)  # read once: it may be a generator
    plan = make_plan(
        model, example_inputs, budget=budget, rank=rank, forms=forms, skip=skip, bake=bake,
        calibration=batches, forward=forward, prefer=prefer, stopwatch=stopwatch, seed=seed, progress=progress,
    )  # fmt: skip
    converted = apply_plan(model, plan, progress=progress)
    if batches is not None:
        refit(converted, model, batches, forward=forward, seed=seed, progress=progress)
    return converted


@same_globals()
@plain_arithmetic()
def make_plan(
    model: nn.Module,
    example_inputs: Batch = None,
    *,
    budget: Budget | None = None,
    rank: int | str | None = None,
    forms: str | Sequence[str] = tuple(FORMS),
    skip: Skip = (),
    bake: bool = False,
    calibration: Any = None,
    forward: Forward | None = None,
    prefer: str = "accuracy",
    stopwatch: Stopwatch | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Plan:
    """Decide what becomes of every convolution, without converting anything. Arguments as for `convert`.

    >>> import convsplit
    >>> plan = convsplit.make_plan(nn.Sequential(nn.Conv2d(16, 32, 3)), rank=1, forms="dw-pw")
    >>> plan.layers[0].params
    (4640, 688)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; want a torch.nn.Module, such as resnet18()")
    if budget is not None and rank is not None:
        raise ValueError(f"give budget= or rank=, not both (got {budget!r} and rank={rank!r})")
    if budget is None and rank is None:
        budget = Budget(params=0.5)
    timed = prefer == "speed" or (budget is not None and budget.kind == "latency")
    _check_preference(prefer, timed, budget, example_inputs)
    forms = [forms] if isinstance(forms, str) else list(forms)
    traced = trace(model, example_inputs)
    sites = find_sites(model, traced, skip=skip, bake=bake)
    if not sites:
        warnings.warn(_nothing_found(model), ConversionWarning, stacklevel=3)  # past the decorator
    marginals = None if calibration is None else _marginals(model, sites, checked_batches(calibration), forward)
    menus = find_options(model, sites, forms=forms, rank=rank, marginals=marginals, seed=seed, progress=progress)
    params = parameter_count(model)
    if timed:
        found = choose_by_time(
            model, example_inputs, menus, budget, prefer=prefer, stopwatch=stopwatch or Stopwatch(),
            model_params=params, model_macs=traced.macs, progress=progress,
        )  # fmt: skip
        layers = planned_layers(sites, found.menus, found.chosen, True)
        return Plan(layers, params, traced.macs, budget, seed, found.model_milliseconds, found.conditions)
    if budget is None:
        chosen = [closest_split(menu) for menu in menus]
    else:
        chosen = allocate(menus, budget, model_params=params, model_macs=traced.macs)
    return Plan(planned_layers(sites, menus, chosen, traced.calls is not None), params, traced.macs, budget, seed)


def _check_preference(prefer: str, timed: bool, budget: Budget | None, example_inputs: Batch) -> None:
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer={prefer!r}; want one of {', '.join(map(repr, PREFERENCES))}")
    if timed and example_inputs is None:
        asked = f'prefer="{prefer}"' if prefer == "speed" else repr(budget)
        raise ValueError(f"{asked} measures layers at the shapes they see: pass example_inputs")


def _marginals(
    model: nn.Module, sites: list[Site], batches: list[Batch], forward: Forward | None
) -> dict[str, Marginals]:
    """The metric of the inputs of every layer that can be split."""
    modules = dict(model.named_modules())
    found = {site.name: equivalent(modules[site.name]) for site in sites if site.splittable}
    convs = {name: each.conv for name, each in found.items() if isinstance(each, Equivalent)}
    return measure_marginals(scratch_copy(model), convs, batches, forward)


def _nothing_found(model: nn.Module) -> str:
    if any(isinstance(module, SeparableConv2d) for module in model.modules()):
        return f"all convolutions of {type(model).__name__} are split already: the result is a plain copy"
    others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)})
    text = f"no Conv2d found in {type(model).__name__}: the result is a plain copy"
    return f"{text} (there are {', '.join(others)}, which convsplit leaves alone)" if others else text
