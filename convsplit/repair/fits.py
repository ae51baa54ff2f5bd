"""What is fitted of a layer: all its factors, its last stage, its bias, or a dense kernel.

Each is a linear map, `kernel` [G, O, I, K], of some samples of what reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from convsplit.data.walk import Stop
from convsplit.forms import Factors, form_named, grouped, ungrouped
from convsplit.layers.separable import SeparableConv
from convsplit.lowrank import CP
from convsplit.repair.samples import Moments, Samples, take_samples
from convsplit.repair.solve import Metric, Quadratic, best_bias, fit_factors, quadratics, with_last_stage
from convsplit.spec import Axes, Convolution, ConvSpec, is_plain

SMALL = 600  # unknowns up to which the products of a fit are computed on one thread
MOST_UNKNOWNS = 5000  # inputs of a convolution, times kernel positions: what closed form is affordable for


@contextmanager
def one_thread(small: bool) -> Iterator[None]:
    """Compute on one thread what is `small`: several would wait for one another wherever a core has other work."""
    threads = torch.get_num_threads()
    if not small or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Fit:
    """A layer while something of it is fitted; nothing in the layer changes before `store`."""

    layer: SeparableConv | Convolution
    original: Tensor  # [G, O, I, K], the kernel that a ridge pulls towards
    kernel: Tensor  # [G, O, I, K], as fitted so far
    has_bias = True  # split layers get one where there is none

    def take(self, stop: Stop) -> Samples:
        """Samples of what the kernel is applied to."""
        raise NotImplementedError

    def centred(self, moments: Moments) -> Moments:
        """The moments about the means, which a bias makes good; about zero where there is none."""
        return moments if self.has_bias else moments.uncentred()

    def metrics(self, moments: Moments, ridge: float) -> list[Metric]:
        """The metric of each group's inputs, which takes over the moments of patches."""
        return Metric.of(self.centred(moments), self.kernel_size, ridge)

    @property
    def kernel_size(self) -> Axes:
        """Of what the samples are patches of."""
        return self.layer.kernel_size if self.original.shape[3] > 1 else (1,)

    def fit_to(self, moments: Moments, metrics: list[Metric], F: Tensor | None) -> Tensor:
        """Fit to moments, in the metrics of each group's inputs and F [G·O, G·O] of the outputs; returns the bias."""
        centred = self.centred(moments)
        with one_thread(moments.patches.shape[1] <= SMALL):
            self.fit(quadratics(self.original, centred, metrics, F))
        return best_bias(self.kernel, centred)

    def fit(self, problems: list[Quadratic]) -> None:
        """Move the kernel to the minimum of each group's quadratic."""
        self.kernel = torch.stack([problem.best for problem in problems])

    def _told(self, size: Axes) -> Axes | None:
        """What a transposed layer is told of the size of its answer, as the model may have told it."""
        return size if self.layer.transposed else None

    def store(self, bias: Tensor) -> None:
        """Put what was found into the layer."""
        raise NotImplementedError

    @property
    def last_unknowns(self) -> int:
        """Of each output, once the kernel is `narrowed`."""
        return self.kernel.shape[2] * self.kernel.shape[3]

    def narrowed(self) -> tuple[Fit, Tensor | None]:
        """What further rounds go on with: the last stage alone, behind filters [G, R, P], where there is one."""
        return self, None


class DenseKernel(Fit):
    """A convolution that was not split, while it makes good what came before it."""

    layer: Convolution

    def __init__(self, layer: Convolution, original: Tensor) -> None:
        self.layer, self.original = layer, original
        self.kernel = grouped(layer.weight.detach().double(), layer.groups, layer.transposed)
        self.has_bias = layer.bias is not None

    def take(self, stop: Stop) -> Samples:
        return take_samples(self.layer, stop, self.layer.groups)

    def store(self, bias: Tensor) -> None:
        self.layer.weight.copy_(ungrouped(self.kernel, ConvSpec.of(self.layer)))
        if self.layer.bias is not None:
            self.layer.bias.copy_(bias)


class AllFactors(Fit):
    """A split layer while all its factors are fitted, or the last stage of a form that ends depthwise."""

    layer: SeparableConv

    def __init__(
        self, layer: SeparableConv, original: Tensor, *, fresh: bool, seed: int, starts: Sequence[CP] = ()
    ) -> None:
        self.layer, self.original, self.fresh, self.seed = layer, original, fresh, seed
        self.starts = [
            Factors(spatial=fit.C.mT, outputs=fit.A, inputs=fit.B.mT).to(torch.float64).by_group()
            for fit in starts
            if form_named(layer.form).expands and form_named(layer.form).projects and fit.A.shape[2] == self._rank
        ]
        self._hold(layer.factors().to(torch.float64).by_group())

    @property
    def last_unknowns(self) -> int:
        return super().last_unknowns if self.layer.factors().outputs is None else self._rank

    @property
    def _rank(self) -> int:
        return self.layer.components // self.layer.groups

    def _hold(self, factors: list[Factors]) -> None:
        self.factors = factors
        self.kernel = Factors.joined(factors).kernel(*self.original.shape[1:3])

    def take(self, stop: Stop) -> Samples:
        pad = ["pad"] if "pad" in self.layer.stages else []
        return take_samples(
            self.layer.geometry, stop, self.layer.groups, lambda x, size: self.layer.through(pad, x),
            unknowns=self._rank * math.prod(self.layer.kernel_size),
        )  # fmt: skip

    def fit(self, problems: list[Quadratic]) -> None:
        form, even = form_named(self.layer.form), self.layer.even
        self._hold(
            [
                fit_factors(problem, form, factors, even=even, seed=self.seed, starts=[s[group] for s in self.starts])
                if self.fresh
                else with_last_stage(problem, factors)
                for group, (problem, factors) in enumerate(zip(problems, self.factors, strict=True))
            ]
        )
        self.fresh = False

    def store(self, bias: Tensor) -> None:
        self.layer.load_factors(Factors.joined(self.factors).balanced())
        self.layer.add_bias().copy_(bias)

    def narrowed(self) -> tuple[Fit, Tensor | None]:
        factors = Factors.joined(self.factors)
        if factors.outputs is None:
            return self, None
        return LastPointwise(self.layer, factors), factors.filters(self.original.shape[2]).flatten(2)


class LastPointwise(Fit):
    """The last stage of a split layer: a dense convolution of what the others make of its input."""

    layer: SeparableConv

    def __init__(self, layer: SeparableConv, factors: Factors) -> None:
        assert factors.outputs is not None
        self.layer, self.factors = layer, factors
        self.kernel = self.original = factors.outputs.double().unsqueeze(3)  # [G, O, R, 1]

    def take(self, stop: Stop) -> Samples:
        *before, name = self.layer.stages
        last = self.layer.stages[name]
        assert is_plain(last)
        return take_samples(
            last, stop, self.layer.groups, lambda x, size: self.layer.through(before, x, self._told(size))
        )

    def store(self, bias: Tensor) -> None:
        self.layer.load_factors(replace(self.factors, outputs=self.kernel.squeeze(3)).balanced())
        self.layer.add_bias().copy_(bias)


class BiasAlone(Fit):
    """The bias of a split layer, added to what its stages make of the input."""

    layer: SeparableConv

    def __init__(self, layer: SeparableConv) -> None:
        self.layer = layer
        eye = torch.eye(layer.out_channels, dtype=torch.float64, device=layer.geometry.weight.device)
        self.kernel = self.original = eye[None, :, :, None]

    def take(self, stop: Stop) -> Samples:
        O, axes, bias = self.layer.out_channels, self.layer.axes, self.layer.bias

        def unbiased(x: Tensor, size: Axes) -> Tensor:
            answer = self.layer.through(self.layer.stages, x, self._told(size))
            return answer if bias is None else answer - bias.view(-1, *[1] * axes)

        return take_samples(ConvSpec(O, O, (1,) * axes).conv(), stop, 1, unbiased)

    def fit(self, problems: list[Quadratic]) -> None:
        pass

    def store(self, bias: Tensor) -> None:
        self.layer.add_bias().copy_(bias)


def fit_of(
    layer: SeparableConv | Convolution, original: Tensor, stages: str, seed: int, starts: Sequence[CP] = ()
) -> Fit:
    """What is fitted of a layer with an original kernel [G, O, I, K]: as much of `stages` as closed form can afford."""
    if not isinstance(layer, SeparableConv):
        return DenseKernel(layer, original)
    projects, wide = form_named(layer.form).projects, unknowns(layer) > MOST_UNKNOWNS
    if stages == "bias" or (wide and not projects):
        return BiasAlone(layer)
    if projects and (wide or stages == "last"):
        return LastPointwise(layer, layer.factors())
    return AllFactors(layer, original, fresh=stages == "all", seed=seed, starts=starts)


def unknowns(layer: SeparableConv | Convolution) -> int:
    """Inputs of a convolution, times kernel positions."""
    return layer.in_channels // layer.groups * math.prod(layer.kernel_size)
