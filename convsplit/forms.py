"""The separable forms: what a component costs, when a form is exact, and its best factors.

All write a kernel as a sum of R components, each the product of a vector over output channels, a vector
over kernel positions and a vector over input channels,

    W[o, i, k]  ~  sum_r outputs[o, r] · spatial[r, k] · inputs[r, i]

and run as: mix the inputs (pointwise), filter each component (depthwise), mix the outputs (pointwise).

    dw-pw      inputs[r] picks one channel: no first stage.     MobileNet's order (Howard et al., 2017)
    pw-dw      outputs[:, r] picks one channel: no last stage.  Xception's order (Chollet, 2017)
    pw-dw-pw   no restriction: the CP decomposition.            MobileNetV2's order (Sandler et al., 2018)

    pw-pw      for kernels of one position, which have nothing to filter: the truncated SVD of W[O, I].

In the first two, R is I·m or O·m with depth multiplier m, or any number when channels get unequal shares.
With G groups, every group has R / G components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convsplit.lowrank import CP as CP
from convsplit.lowrank import Curve as Curve
from convsplit.lowrank import SliceSVD, cp_curves, cp_each, curve_work, fit_work, slice_svd
from convsplit.spec import Axes, ConvSpec


@dataclass(frozen=True)
class Factors:
    """The components of one kernel; O, I and R count per group. The stage that picks channels is an index."""

    spatial: Tensor  # [G, R, K]
    outputs: Tensor | None = None  # [G, O, R]; None where each component adds to one output channel
    inputs: Tensor | None = None  # [G, R, I]; None where each component reads one input channel
    channels: Tensor | None = None  # [G, R], rising: the channel of each component where a stage is None

    def kernel(self, out_channels: int, in_channels: int) -> Tensor:
        """The kernel [G, O, I, K] these components add up to; both channel counts per group."""
        outputs = self._picked(out_channels).mT if self.outputs is None else self.outputs
        filters = self.filters(in_channels)
        return (outputs @ filters.flatten(2)).reshape(*outputs.shape[:2], *filters.shape[2:])

    def filters(self, in_channels: int) -> Tensor:
        """The kernel [G, R, I, K] of each component in front of the outputs."""
        inputs = self._picked(in_channels) if self.inputs is None else self.inputs
        return inputs.unsqueeze(-1) * self.spatial.unsqueeze(-2)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another dtype."""
        outputs = None if self.outputs is None else self.outputs.to(dtype)
        inputs = None if self.inputs is None else self.inputs.to(dtype)
        return Factors(self.spatial.to(dtype), outputs, inputs, self.channels)

    def absolute(self) -> Factors:
        """Absolute values: the kernel they add up to bounds the rounding of the one that these do."""
        outputs = None if self.outputs is None else self.outputs.abs()
        inputs = None if self.inputs is None else self.inputs.abs()
        return Factors(self.spatial.abs(), outputs, inputs, self.channels)

    def norms(self) -> Tensor:
        """The Frobenius norm [G, R] of each component's part of the kernel."""
        norms: Tensor = self.spatial.norm(dim=2)
        norms = norms if self.outputs is None else norms * self.outputs.norm(dim=1)
        return norms if self.inputs is None else norms * self.inputs.norm(dim=2)

    def by_group(self) -> list[Factors]:
        """One `Factors` with G = 1 for each group."""
        parts = (self.spatial, self.outputs, self.inputs, self.channels)
        return [
            Factors(*(None if part is None else part[group : group + 1] for part in parts))  # type: ignore[arg-type]
            for group in range(len(self.spatial))
        ]

    @classmethod
    def joined(cls, groups: Sequence[Factors]) -> Factors:
        """Put together what `by_group` took apart."""
        columns = zip(*((f.spatial, f.outputs, f.inputs, f.channels) for f in groups), strict=True)
        return cls(*(None if parts[0] is None else torch.cat(parts) for parts in columns))  # type: ignore[arg-type]

    def balanced(self) -> Factors:
        """The same kernel with each component's norm spread equally over the stages.

        The product is unchanged by moving a factor from one stage to another; equal norms keep gradients of the
        stages comparable, weight decay fair and every value inside the range of half precision. Between two pointwise
        stages one position is a number and no stage: it becomes 1.
        """
        if self.spatial.shape[2] == 1 and self.outputs is not None and self.inputs is not None:
            inner: Tensor = self.inputs * self.spatial
            ratio = (self.outputs.norm(dim=1) / inner.norm(dim=2)).sqrt().nan_to_num(0, 0, 0)
            outer = self.outputs * torch.where(ratio > 0, 1 / ratio, 0.0).unsqueeze(1)
            return Factors(torch.ones_like(self.spatial), outer, inner * ratio.unsqueeze(2))
        norms = [self.spatial.norm(dim=2)]
        norms += [] if self.outputs is None else [self.outputs.norm(dim=1)]
        norms += [] if self.inputs is None else [self.inputs.norm(dim=2)]
        stacked = torch.stack(norms)  # [stages, G, R]
        alive = (stacked > 0).all(dim=0)
        mean = torch.where(alive, stacked, 1.0).log().mean(dim=0).exp()
        scale = torch.where(alive, mean / torch.where(alive, stacked, 1.0), 0.0)
        by_stage = iter(scale)
        spatial = self.spatial * next(by_stage).unsqueeze(2)
        outputs = None if self.outputs is None else self.outputs * next(by_stage).unsqueeze(1)
        inputs = None if self.inputs is None else self.inputs * next(by_stage).unsqueeze(2)
        return replace(self, spatial=spatial, outputs=outputs, inputs=inputs)

    def _picked(self, channels: int) -> Tensor:
        assert self.channels is not None
        return torch.nn.functional.one_hot(self.channels, channels).to(self.spatial.dtype)


def grouped(weight: Tensor, groups: int, transposed: bool = False) -> Tensor:
    """View a weight [O, I per group, kh, kw], or a transposed one [I, O per group, kh, kw], as [G, O, I, K]."""
    kernel = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return kernel.transpose(1, 2) if transposed else kernel


def _grouped_shape(spec: ConvSpec) -> tuple[int, int, int, int]:
    """G, O, I and K of a kernel."""
    G = spec.groups
    return G, spec.out_channels // G, spec.in_channels // G, spec.positions


def ungrouped(kernel: Tensor, spec: ConvSpec) -> Tensor:
    """The weight of a kernel [G, O, I, K]."""
    kernel = kernel.transpose(1, 2) if spec.transposed else kernel
    return kernel.flatten(0, 1).reshape(-1, kernel.shape[2], *spec.kernel_size)


class Form:
    """One way to write a convolution as depthwise and pointwise stages. `components` is R of the whole layer."""

    name: str
    expands: bool  # starts with a pointwise stage
    projects: bool  # ends with a pointwise stage
    filters = True  # has a depthwise stage

    def suits(self, spec: ConvSpec) -> bool:
        """Whether it is made for kernels of so many positions."""
        return self.filters == (spec.positions > 1)

    def channels(self, spec: ConvSpec) -> int:
        """Channels that components belong to: the step of R at which every channel has equally many."""
        raise NotImplementedError

    def exact(self, spec: ConvSpec) -> int:
        """The number of components at which any kernel of this shape is reproduced exactly."""
        raise NotImplementedError

    def curve(self, kernel: Tensor, components: Sequence[int], *, even: bool = False, seed: int = 0) -> Curve:
        """Relative Frobenius error of the best factors of kernel [G, O, I, K] at each number of components."""
        return self.curves([kernel], components, even=even, seed=seed)[0]

    def curves(
        self,
        kernels: Sequence[Tensor],
        components: Sequence[int],
        *,
        even: bool = False,
        seed: int = 0,
        correlations: Sequence[Tensor | None] | None = None,
    ) -> list[Curve]:
        """`curve` of several kernels of one shape, found together: small ones in a fraction of the time.

        `correlations` [G, I, I] of each one's input channels count where the form reads these one by one, so that no
        metric of kernels has them.
        """
        known = [None] * len(kernels) if correlations is None or self.expands else correlations
        return [
            _slice_curve(slice_svd(self._slices(kernel)), components, even, own)
            for kernel, own in zip(kernels, known, strict=True)
        ]

    def factorise(
        self, kernel: Tensor, components: int, *, even: bool = False, seed: int = 0, fits: Sequence[CP] = ()
    ) -> Factors:
        """The best factors of kernel [G, O, I, K], balanced. `fits` of it, from its curve, are where CP starts."""
        return self.factorise_each([kernel], [components], even=[even], seed=seed, fits=[fits])[0]

    def factorise_each(
        self,
        kernels: Sequence[Tensor],
        components: Sequence[int],
        *,
        even: Sequence[bool] | None = None,
        seed: int = 0,
        fits: Sequence[Sequence[CP]] | None = None,
    ) -> list[Factors]:
        """`factorise` of several kernels of one shape, found together: small ones in a fraction of the time."""
        evens = [False] * len(kernels) if even is None else even
        return [self._truncated(*each) for each in zip(kernels, components, evens, strict=True)]

    def _slices(self, kernel: Tensor) -> Tensor:
        """The matrices [G, C, m, n] of a kernel [G, O, I, K] that components of rank one add up to."""
        raise NotImplementedError

    def _truncated(self, kernel: Tensor, components: int, even: bool) -> Factors:
        """The best factors, from the singular vectors of the slices."""
        raise NotImplementedError

    def curve_work(self, spec: ConvSpec, components: Sequence[int]) -> float:
        """About how long `curve` takes, in operations."""
        return self._svd_work(spec)

    def fit_work(self, spec: ConvSpec, components: int) -> float:
        """About how long `factorise` takes, in operations."""
        return self._svd_work(spec)

    def _svd_work(self, spec: ConvSpec) -> float:
        """SVDs of slices [m, n]: some 20 m n min(m, n) operations each."""
        return 20.0 * spec.weight_params * self.exact(spec) / self.channels(spec)

    def components(self, spec: ConvSpec, rank: int) -> int:
        """R for a rank as users give it: the depth multiplier, or the CP rank per group, at most the exact one."""
        return min(rank * self.channels(spec), self.exact(spec))

    def params(self, spec: ConvSpec, components: int) -> int:
        """Parameters of the stages, without bias."""
        return components * self._params_per_component(spec)

    def most_components(self, spec: ConvSpec) -> int:
        """The largest R, a multiple of the groups, that has fewer parameters than the dense weight."""
        most = (spec.weight_params - 1) // self._params_per_component(spec)
        return min(most, self.exact(spec)) // spec.groups * spec.groups

    def macs(self, spec: ConvSpec, components: int, input_size: Axes, output_size: Axes) -> int:
        """MACs of the stages for one image: a pointwise stage before the depthwise one runs at the input's size."""
        slides = math.prod(spec.slides_over(input_size, output_size))
        expand = self.expands * (math.prod(input_size) if self.filters else slides) * spec.in_channels // spec.groups
        project = self.projects * math.prod(output_size) * spec.out_channels // spec.groups
        filters = self.filters * slides * spec.positions
        return components * (expand + filters + project)

    def _params_per_component(self, spec: ConvSpec) -> int:
        expand, project = self.expands * spec.in_channels, self.projects * spec.out_channels
        return expand // spec.groups + self.filters * spec.positions + project // spec.groups

    def __repr__(self) -> str:
        return f"Form({self.name!r})"


class DepthwisePointwise(Form):
    """Depthwise I -> R, pointwise R -> O. Per input channel, the truncated SVD of W[:, i, :]."""

    name, expands, projects = "dw-pw", False, True

    def channels(self, spec: ConvSpec) -> int:
        return spec.in_channels

    def exact(self, spec: ConvSpec) -> int:
        return spec.in_channels * min(spec.out_channels // spec.groups, spec.positions)

    def _slices(self, kernel: Tensor) -> Tensor:
        return kernel.transpose(1, 2)

    def _truncated(self, kernel: Tensor, components: int, even: bool) -> Factors:
        channels, left, right = _kept_triplets(slice_svd(self._slices(kernel)), components, even)
        return Factors(spatial=right, outputs=left.mT, channels=channels).balanced()


class PointwiseDepthwise(Form):
    """Pointwise I -> R, depthwise R -> O. Per output channel, the truncated SVD of W[o]."""

    name, expands, projects = "pw-dw", True, False

    def channels(self, spec: ConvSpec) -> int:
        return spec.out_channels

    def exact(self, spec: ConvSpec) -> int:
        return spec.out_channels * min(spec.in_channels // spec.groups, spec.positions)

    def _slices(self, kernel: Tensor) -> Tensor:
        return kernel

    def _truncated(self, kernel: Tensor, components: int, even: bool) -> Factors:
        channels, left, right = _kept_triplets(slice_svd(self._slices(kernel)), components, even)
        return Factors(spatial=right, inputs=left, channels=channels).balanced()


class PointwiseDepthwisePointwise(Form):
    """Pointwise I -> R, depthwise R, pointwise R -> O. The CP decomposition of the kernel."""

    name, expands, projects = "pw-dw-pw", True, True

    def channels(self, spec: ConvSpec) -> int:
        return spec.groups

    def exact(self, spec: ConvSpec) -> int:
        # An SVD of each slice is a CP decomposition with one factor made of unit vectors; slice the cheapest way.
        I, O, K = spec.in_channels // spec.groups, spec.out_channels // spec.groups, spec.positions
        return spec.groups * min(I * min(O, K), O * min(I, K), K * min(I, O))

    def curves(
        self,
        kernels: Sequence[Tensor],
        components: Sequence[int],
        *,
        even: bool = False,
        seed: int = 0,
        correlations: Sequence[Tensor | None] | None = None,
    ) -> list[Curve]:
        return cp_curves(kernels, [count // kernels[0].shape[0] for count in components], seed=seed)

    def factorise_each(
        self,
        kernels: Sequence[Tensor],
        components: Sequence[int],
        *,
        even: Sequence[bool] | None = None,
        seed: int = 0,
        fits: Sequence[Sequence[CP]] | None = None,
    ) -> list[Factors]:
        ranks = [count // kernels[0].shape[0] for count in components]
        known = fits or [()] * len(kernels)
        starts = [_nearest(each, rank) for each, rank in zip(known, ranks, strict=True)]
        found = cp_each(kernels, ranks, starts=starts, seed=seed)
        return [Factors(spatial=fit.C.mT, outputs=fit.A, inputs=fit.B.mT).balanced() for fit in found]

    def curve_work(self, spec: ConvSpec, components: Sequence[int]) -> float:
        return curve_work(_grouped_shape(spec), [count // spec.groups for count in components])

    def fit_work(self, spec: ConvSpec, components: int) -> float:
        return fit_work(_grouped_shape(spec), components // spec.groups)


class PointwisePointwise(Form):
    """Pointwise I -> R, which has the convolution's stride and padding, pointwise R -> O. The truncated SVD."""

    name, expands, projects, filters = "pw-pw", True, True, False

    def channels(self, spec: ConvSpec) -> int:
        return spec.groups

    def exact(self, spec: ConvSpec) -> int:
        return min(spec.in_channels, spec.out_channels)

    def _slices(self, kernel: Tensor) -> Tensor:
        return kernel.permute(0, 3, 1, 2)

    def _truncated(self, kernel: Tensor, components: int, even: bool) -> Factors:
        _, left, right = _kept_triplets(slice_svd(self._slices(kernel)), components, False)
        return Factors(spatial=left.new_ones(*left.shape[:2], 1), outputs=left.mT, inputs=right).balanced()


FORMS: dict[str, Form] = {  # of kernels with several positions
    form.name: form for form in (DepthwisePointwise(), PointwiseDepthwise(), PointwiseDepthwisePointwise())
}
POINTWISE = PointwisePointwise()
KNOWN: dict[str, Form] = {**FORMS, POINTWISE.name: POINTWISE}


def form_named(name: str) -> Form:
    """Look a form up; an unknown name raises ValueError with the known ones."""
    if name not in KNOWN:
        raise ValueError(f"unknown form {name!r}; the forms are {', '.join(map(repr, KNOWN))}")
    return KNOWN[name]


def _slice_curve(svd: SliceSVD, components: Sequence[int], even: bool, correlations: Tensor | None = None) -> Curve:
    groups, channels, _ = svd.values.shape
    if correlations is not None:
        per_group = [count // groups for count in components]
        return Curve(tuple(svd.correlated_errors(per_group, correlations, even=even)))
    errors = svd.errors(even=even).tolist()
    step = groups * channels if even else groups
    return Curve(tuple(errors[min(count // step, len(errors) - 1)] for count in components))


def _nearest(fits: Sequence[CP], rank: int) -> CP | None:
    """The fit whose rank is the smallest factor away."""
    return min(fits, key=lambda fit: abs(math.log(fit.rank / rank)), default=None)


def _kept_triplets(svd: SliceSVD, components: int, even: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Channel [G, R] of each kept triplet, its left vector times its singular value [G, R, m], right [G, R, n]."""
    groups, _, triplets = svd.values.shape
    kept = svd.keep(components // groups, even=even)
    rows = torch.arange(groups, device=kept.device).unsqueeze(1)
    left = svd.left.mT.flatten(1, 2)[rows, kept] * svd.values.flatten(1)[rows, kept].unsqueeze(2)
    return kept // triplets, left, svd.right.flatten(1, 2)[rows, kept]
