"""Options: every way to run one convolution, with what it costs and how far it is from the original.

"Keep dense" is always the first option of a site; the others cost less than it, in parameters and, where shapes
are known, in MACs. Errors are relative Frobenius errors of the weight,

    || W - W' || / || W ||,

so that 0 is exact and 1 is as bad as leaving the layer out. Where calibration data are at hand, the norm is that of
the metric of the layer's inputs, so that it is the layer's output whose relative error is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from convsplit.data.moments import Marginals, whitened
from convsplit.forms import FORMS, Form, form_named, grouped
from convsplit.kinds import Equivalent, equivalent
from convsplit.model.sites import Site
from convsplit.parallel import in_parallel
from convsplit.spec import ConvSpec

GRID = 32  # ranks tried per form, in equal ratios: steps of about 12 % between 3 % and all of the dense cost
SMALLEST = 0.03
MULTIPLE = 8  # widths that are multiples of it fill the vector registers of every current CPU and GPU


@dataclass(frozen=True)
class Option:
    """One way to run a convolution. `form` is empty for the dense one.

    `macs` and `milliseconds` add up its calls, None where unknown; `arrangement` is that of `SeparableConv2d`.
    """

    form: str
    components: int
    even: bool
    params: int
    macs: int | None
    error: float | None
    milliseconds: float | None = None
    arrangement: str = "stages"

    @property
    def dense(self) -> bool:
        return not self.form


@dataclass(frozen=True)
class Menu:
    """A site and its options, the dense one first. `note` says why others were taken out, where that is so."""

    site: Site
    options: tuple[Option, ...]
    note: str = ""

    @property
    def dense(self) -> Option:
        return self.options[0]

    def at(self, site: Site) -> Menu:
        """The same options where the layer sees inputs of another size: with the MACs of those."""
        counted = (replace(option, macs=_macs(site, option.form, option.components)) for option in self.options)
        return replace(self, site=site, options=tuple(counted))


def find_options(
    model: nn.Module,
    sites: Iterable[Site],
    *,
    forms: Sequence[str] = tuple(FORMS),
    rank: int | str | None = None,
    marginals: Mapping[str, Marginals] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Menu]:
    """The options of every splittable site: a grid of ranks of each form, or the one given `rank`.

    `marginals` of the sites' inputs, from `measure_marginals`, turn errors of weights into errors of outputs.

    Raises:
        ValueError: an unknown form, or a rank that is neither a positive integer nor "full".
    """
    chosen = [form_named(name) for name in forms]
    if not chosen:
        raise ValueError(f"forms is empty; name at least one of {', '.join(map(repr, FORMS))}")
    check_rank(rank)
    splittable = [site for site in sites if site.splittable]
    originals = {site.name: equivalent(model.get_submodule(site.name)) for site in splittable}

    def menu(site: Site) -> Menu:
        known = (marginals or {}).get(site.name)
        return Menu(site, (dense_option(site), *_options(originals[site.name], site, chosen, rank, known, seed)))

    return in_parallel(
        menu, splittable, "Error curves", size=lambda site: dense_option(site).params, progress=progress
    )


def check_rank(rank: int | str | None) -> None:
    """Refuse what is not a rank."""
    if rank is None or rank == "full":
        return
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f'rank={rank!r}: want a positive integer, "full" or None')
    if rank < 1:
        raise ValueError(f"rank={rank}: the rank is at least 1")


def dense_option(site: Site) -> Option:
    """The convolution as it is."""
    assert site.spec is not None
    return Option("", 0, True, site.spec.weight_params, _macs(site, "", 0), 0.0)


def _options(
    original: Equivalent | str,
    site: Site,
    forms: Sequence[Form],
    rank: int | str | None,
    marginals: Marginals | None,
    seed: int,
) -> list[Option]:
    spec = site.spec
    assert spec is not None
    assert isinstance(original, Equivalent)
    weight = original.conv.weight.detach()
    kernel = grouped(weight.to(torch.promote_types(weight.dtype, torch.float32)), spec.groups).contiguous()
    if rank == "full":
        return [min((_full(site, form) for form in forms), key=lambda option: option.params)]
    options: list[Option] = []
    for form in forms:
        counts = _grid(form, spec) if rank is None else [form.components(spec, int(rank))]
        even = rank is not None or (form.expands and form.projects)
        if counts:
            errors = form.errors(_in_metric(kernel, form, marginals), counts, even=even, seed=seed)
            options += [_option(site, form, R, even, error) for R, error in zip(counts, errors, strict=True)]
    dense = dense_option(site)
    return [option for option in options if _costs_less(option, dense)]


def _in_metric(kernel: Tensor, form: Form, marginals: Marginals | None) -> Tensor:
    """The kernel as the form has to approximate it: in the metric of its inputs where that is known."""
    if marginals is None:
        return kernel
    return whitened(kernel, *marginals.roots(mix_channels=form.expands)).to(kernel.dtype)


def _full(site: Site, form: Form) -> Option:
    assert site.spec is not None
    return _option(site, form, form.exact(site.spec), True, 0.0)


def _option(site: Site, form: Form, components: int, even: bool, error: float) -> Option:
    assert site.spec is not None
    macs = _macs(site, form.name, components)
    return Option(form.name, components, even, form.params(site.spec, components), macs, error)


def _macs(site: Site, form: str, components: int) -> int | None:
    """MACs of all calls of a site, in a form or (where that is empty) as it is; None where no calls are known."""
    spec, calls = site.spec, site.calls
    assert spec is not None
    if not calls:
        return None
    if not form:
        return sum(use.images * spec.macs(use.output_hw) for use in calls)
    count = form_named(form).macs
    return sum(use.images * count(spec, components, use.input_hw, use.output_hw) for use in calls)


def _costs_less(option: Option, dense: Option) -> bool:
    fewer_macs = option.macs is None or dense.macs is None or option.macs < dense.macs
    return option.params < dense.params and fewer_macs


def _grid(form: Form, spec: ConvSpec) -> list[int]:
    """Numbers of components in equal ratios up to the largest that saves parameters."""
    most = form.most_components(spec)
    if most < spec.groups:
        return []
    ratio = SMALLEST ** (1 / (GRID - 1))
    wanted = (most * ratio**index for index in range(GRID))
    counts = {_rounded(count / spec.groups) * spec.groups for count in wanted}
    return sorted(count for count in counts if spec.groups <= count <= most)


def _rounded(rank: float) -> int:
    """The nearest multiple of 8, or of less where that would be a step of more than an eighth."""
    step = min(MULTIPLE, 1 << max(0, int(math.log2(max(rank, 1) / MULTIPLE))))
    return round(rank / step) * step
