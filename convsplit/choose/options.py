"""Options: every way to run one convolution, with what it costs and how far it is from the original.

"Keep dense" is always the first option of a site; the others cost less than it, in parameters and, where shapes
are known, in MACs. Errors are relative Frobenius errors of the weight,

    || W - W' || / || W ||,

so that 0 is exact and 1 is as bad as leaving the layer out. The norm is that of the metric of the layer's inputs, so
that the error is the relative error of the layer's output: measured where calibration data are at hand, else assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from convsplit.data.moments import Assumed, Marginals, whitened
from convsplit.forms import CP, FORMS, Form, grouped
from convsplit.model.running import macs_per_input
from convsplit.model.sites import Site
from convsplit.parallel import in_batches
from convsplit.precision import full_products, widened
from convsplit.spec import ConvSpec
from convsplit.structure import Structure

GRID = 32  # ranks tried per form, in equal ratios: steps of about 12 % between 3 % and all of the dense cost
SMALLEST = 0.03
MULTIPLE = 8  # widths that are multiples of it fill the vector registers of every current CPU and GPU


@dataclass(frozen=True)
class Option:
    """One way to run a convolution. `structure` is None for the dense one.

    `macs` (per input) and `milliseconds` (of the example inputs) add up its calls, None where unknown; `arrangement` is
    that of `SeparableConv2d`.
    """

    structure: Structure | None
    params: int
    macs: int | None
    error: float | None
    milliseconds: float | None = None
    arrangement: str = "stages"

    @property
    def dense(self) -> bool:
        return self.structure is None


@dataclass(frozen=True)
class Menu:
    """A site and its options, the dense one first. `note` says why others were removed, if any were."""

    site: Site
    options: tuple[Option, ...]
    note: str = ""
    fits: tuple[CP, ...] = field(default=(), repr=False, compare=False)  # behind the errors, in the same metric

    @property
    def dense(self) -> Option:
        return self.options[0]

    def at(self, site: Site) -> Menu:
        """The same options where the layer sees inputs of another size: with the MACs of those."""
        counted = (replace(option, macs=_macs(site, option.structure)) for option in self.options)
        return replace(self, site=site, options=tuple(counted))


@full_products()
def find_menus(
    sites: Iterable[Site],
    *,
    forms: Sequence[Form] = tuple(FORMS.values()),
    rank: int | None = None,
    even: bool = False,
    marginals: Mapping[str, Marginals | Assumed] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Menu]:
    """The options of every splittable site: a grid of ranks of each form, or the one given `rank`.

    With `even` all depth multipliers that save something, instead of unequal ones: no channels are gathered or added up
    then, which some runtimes are slow at. `marginals` of the sites' inputs, measured or assumed, turn errors of weights
    into errors of outputs.
    """

    def menus(alike: list[Site]) -> list[Menu]:
        return _menus(alike, forms, rank, even, [(marginals or {}).get(site.name) for site in alike], seed)

    def work(site: Site) -> float:
        assert site.spec is not None
        counts = {form: _counts(form, site.spec, rank, even) for form in forms}
        return sum(form.curve_work(site.spec, found) for form, found in counts.items() if found)

    return in_batches(
        menus, _splittable(sites), "Error curves", alike=_kind, size=lambda site: dense_option(site).params,
        cost=work, progress=progress,
    )  # fmt: skip


def _kind(site: Site) -> tuple[object, ...]:
    """What layers whose kernels are fitted together have in common."""
    weight, spec = _weight(site), site.spec
    assert spec is not None
    return spec.groups, spec.out_channels, spec.in_channels, spec.positions, weight.dtype, weight.device


def exact_menus(sites: Iterable[Site], forms: Sequence[Form] = tuple(FORMS.values())) -> list[Menu]:
    """For every splittable site its cheapest exact rewriting, whatever that costs; nothing is factorised."""
    menus = []
    for site in _splittable(sites):
        assert site.spec is not None
        structures = [Structure.exact(site.spec, form.name) for form in forms if form.suits(site.spec)]
        exact = sorted((_option(site, each, 0.0) for each in structures), key=lambda option: option.params)
        menus.append(Menu(site, (dense_option(site), *exact[:1])))
    return menus


def closest_split(menu: Menu) -> Option:
    """With a fixed rank nothing is traded: the form with the smallest error, dense only where none is allowed."""
    return min(menu.options[1:], key=lambda option: (option.error, option.params), default=menu.dense)


def _splittable(sites: Iterable[Site]) -> list[Site]:
    return [site for site in sites if site.splittable]


def check_rank(rank: int | None) -> None:
    """Refuse what is not a rank."""
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise ValueError(f"rank={rank!r}: want a positive integer or None; for an exact rewriting say exact=True")
    if rank < 1:
        raise ValueError(f"rank={rank}: the rank is at least 1")


def dense_option(site: Site) -> Option:
    """The convolution as it is."""
    assert site.spec is not None
    return Option(None, site.spec.weight_params, _macs(site, None), 0.0)


def _menus(
    sites: Sequence[Site],
    forms: Sequence[Form],
    rank: int | None,
    even: bool,
    marginals: Sequence[Marginals | Assumed | None],
    seed: int,
) -> list[Menu]:
    """The menus of sites whose kernels have one shape."""
    spec = sites[0].spec
    assert spec is not None
    kernels = [grouped(widened(_weight(site)), spec.groups, spec.transposed).contiguous() for site in sites]
    options: list[list[Option]] = [[] for _ in sites]
    fits: list[tuple[CP, ...]] = [() for _ in sites]
    for form in forms:
        counts = _counts(form, spec, rank, even)
        equal = even or rank is not None or (form.expands and form.projects)
        if not counts:
            continue
        structures = [Structure(form.name, count, equal) for count in counts]
        measured = [_in_metric(kernel, form, known) for kernel, known in zip(kernels, marginals, strict=True)]
        correlations = [_correlations(known) for known in marginals]
        curves = form.curves(measured, counts, even=equal, seed=seed, correlations=correlations)
        for index, curve in enumerate(curves):
            options[index] += [
                _option(sites[index], each, error) for each, error in zip(structures, curve.errors, strict=True)
            ]
            fits[index] += curve.fits
    return [
        Menu(site, (dense_option(site), *_saving(site, found)), fits=held)
        for site, found, held in zip(sites, options, fits, strict=True)
    ]


def _counts(form: Form, spec: ConvSpec, rank: int | None, even: bool) -> list[int]:
    """The numbers of components of a form that are looked at; none where it is made for other kernels."""
    if not form.suits(spec):
        return []
    if rank is not None:
        return [form.components(spec, rank)]
    return _multiples(form, spec) if even else _grid(form, spec)


def _weight(site: Site) -> Tensor:
    assert site.original is not None
    return site.original.conv.weight.detach()


def _saving(site: Site, options: Sequence[Option]) -> list[Option]:
    dense = dense_option(site)
    return [option for option in options if _costs_less(site, option, dense)]


def _in_metric(kernel: Tensor, form: Form, marginals: Marginals | Assumed | None) -> Tensor:
    """The kernel as the form has to approximate it: in the metric of its inputs where that is known."""
    if marginals is None:
        return kernel
    return whitened(kernel, *marginals.roots(mix_channels=form.expands)).to(kernel.dtype)


def _correlations(marginals: Marginals | Assumed | None) -> Tensor | None:
    return marginals.correlations if isinstance(marginals, Marginals) else None


def _option(site: Site, structure: Structure, error: float) -> Option:
    assert site.spec is not None
    return Option(structure, structure.params(site.spec), _macs(site, structure), error)


def _macs(site: Site, structure: Structure | None) -> int | None:
    """MACs per input of a site, in a structure or (where there is none) as it is; None where no calls are known."""
    spec, calls = site.spec, site.calls
    assert spec is not None
    if not calls:
        return None
    if structure is None:
        return macs_per_input(calls, spec.axes, lambda *sizes: spec.macs(spec.slides_over(*sizes)))
    return macs_per_input(calls, spec.axes, lambda *sizes: structure.macs(spec, *sizes))


def _costs_less(site: Site, option: Option, dense: Option) -> bool:
    """Fewer parameters and fewer MACs; where no inputs tell the shapes, for one position that the kernel is at.

    The map on the other side has stride x stride positions for each of them, and so often a pointwise stage runs there.
    """
    spec, structure = site.spec, option.structure
    assert spec is not None
    assert structure is not None
    if option.macs is None or dense.macs is None:
        one = (1,) * spec.axes
        sizes = (one, spec.stride) if spec.transposed else (spec.stride, one)
        fewer_macs = structure.macs(spec, *sizes) < spec.macs(one)
    else:
        fewer_macs = option.macs < dense.macs
    return option.params < dense.params and fewer_macs


def unless_measured(site: Site) -> Site:
    """The site, left alone if it is a patch embedding: a kernel no larger than its stride.

    Each input is read once there, and once more by every further stage, so fewer MACs may take many times as long: only
    measured time can recommend it.
    """
    spec = site.spec
    if spec is None or not site.splittable or spec.transposed or spec.positions == 1:
        return site
    if any(s < k for s, k in zip(spec.stride, spec.kernel_size, strict=True)):
        return site
    return replace(site, reason='a patch embedding (stride >= kernel): split with prefer="speed", where it is faster')


def _grid(form: Form, spec: ConvSpec) -> list[int]:
    """Numbers of components in equal ratios up to the largest that saves parameters."""
    most = form.most_components(spec)
    if most < spec.groups:
        return []
    ratio = SMALLEST ** (1 / (GRID - 1))
    wanted = (most * ratio**index for index in range(GRID))
    counts = {_rounded(count / spec.groups) * spec.groups for count in wanted}
    return sorted(count for count in counts if spec.groups <= count <= most)


def _multiples(form: Form, spec: ConvSpec) -> list[int]:
    """Numbers of components of all ranks that save parameters."""
    channels = form.channels(spec)
    return list(range(channels, form.most_components(spec) + 1, channels))


def _rounded(rank: float) -> int:
    """The nearest multiple of 8, or of less where that would be a step of more than an eighth."""
    step = min(MULTIPLE, 1 << max(0, int(math.log2(max(rank, 1) / MULTIPLE))))
    return round(rank / step) * step
