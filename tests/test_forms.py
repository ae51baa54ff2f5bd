"""Factorisations: optimal where that is provable, monotone, honest about their error and their cost."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from convsplit import SeparableConv2d
from convsplit.forms import FORMS, form_named, grouped
from convsplit.lowrank import cp, slice_svd
from convsplit.spec import ConvSpec

SVD_FORMS = ["dw-pw", "pw-dw"]


def kernel(groups=1, O=6, I=5, K=9, seed=0, terms=12, decay=0.7) -> torch.Tensor:
    """A kernel [G, O, I, K] with a falling spectrum, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.zeros(groups, O, I, K, dtype=torch.float64)
    for r in range(terms):
        a, b, c = (torch.randn(groups, n, generator=generator, dtype=torch.float64) for n in (O, I, K))
        W += decay**r * torch.einsum("go,gi,gk->goik", a, b, c)
    return W + 0.02 * torch.randn(W.shape, generator=generator, dtype=torch.float64)


def relative_error(factors, W) -> float:
    return float((factors.kernel(W.shape[1], W.shape[2]) - W).norm() / W.norm())


def oracle_values(form: str, W: torch.Tensor) -> np.ndarray:
    """Singular values of each slice, one dense SVD at a time: [G, channels, q]."""
    slices = W.transpose(1, 2) if form == "dw-pw" else W
    return np.array([[np.linalg.svd(m, compute_uv=False) for m in group] for group in slices.numpy()])


@pytest.mark.parametrize("form", SVD_FORMS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("even", [True, False])
def test_svd_forms_are_optimal(form, groups, even):
    W = kernel(groups)
    values = oracle_values(form, W)
    channels, q = values.shape[1:]
    for m in range(1, q + 1):
        per_group = m * channels
        if even:
            lost = (values[:, :, m:] ** 2).sum()
        else:
            lost = sum((np.sort(group.ravel())[: channels * q - per_group] ** 2).sum() for group in values)
        best = float(np.sqrt(lost) / W.norm())
        R = groups * per_group
        assert form_named(form).curve(W, [R], even=even).errors[0] == pytest.approx(best, abs=1e-7)
        assert relative_error(form_named(form).factorise(W, R, even=even), W) == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("form", SVD_FORMS)
def test_unequal_multiplicity_is_never_worse(form):
    W = kernel(2)
    channels = 2 * (W.shape[2] if form == "dw-pw" else W.shape[1])
    for m in range(1, 5):
        even, uneven = (form_named(form).curve(W, [m * channels], even=e).errors[0] for e in (True, False))
        assert uneven <= even + 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_error_falls_as_rank_rises_and_ends_exact(form, groups):
    W = kernel(groups)
    spec = ConvSpec(5 * groups, 6 * groups, (3, 3), groups=groups)
    exact = form_named(form).exact(spec)
    counts = sorted({groups * n for n in (1, 2, 4, 7, 12, 20, exact // groups)})
    fitted = [relative_error(form_named(form).factorise(W, R), W) for R in counts]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(fitted))
    assert fitted[-1] < 1e-7


@pytest.mark.parametrize("form", FORMS)
def test_promised_error_is_attained(form):
    W = kernel(O=16, I=12)
    counts = [12, 24, 36]
    promised = form_named(form).curve(W, counts).errors
    for R, error in zip(counts, promised, strict=True):
        exact_curve = form in SVD_FORMS  # that of CP is interpolated between a few short fits
        tolerance = {"abs": 1e-6} if exact_curve else {"rel": 0.15, "abs": 5e-3}
        assert relative_error(form_named(form).factorise(W, R), W) == pytest.approx(error, **tolerance)


def test_cp_is_never_worse_than_the_svd_forms_at_equal_rank():
    W = kernel(O=8, I=7)
    for R in (7, 14, 21):
        svd = min(form_named(form).curve(W, [R]).errors[0] for form in SVD_FORMS)
        assert cp(W, R).error <= svd + 1e-9


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 4, 1, 9), (1, 1, 4, 9), (2, 3, 2, 3), (1, 3, 2, 64)])
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_cp_of_any_shape_and_rank(shape, rank):
    W = kernel(*shape)
    fit = cp(W, rank)
    assert fit.A.shape == (shape[0], shape[1], rank)
    assert torch.isfinite(torch.stack([fit.A.sum(), fit.B.sum(), fit.C.sum()])).all()
    assert 0 <= fit.error <= 1


def test_cp_of_zeros_dead_channels_and_twins():
    assert cp(torch.zeros(1, 4, 4, 9), 3).error == 0
    W = kernel(O=8, I=8)
    W[:, 3] = 0
    W[:, :, 2] = 0
    W[:, 5] = W[:, 4]
    fit = cp(W, 6)
    assert torch.isfinite(fit.A).all()
    assert fit.error < 1


def test_cp_repeats_and_leaves_global_state_alone():
    import tensorly

    W = kernel()
    state, backend = torch.get_rng_state(), tensorly.get_backend()
    one, two = cp(W, 5, seed=3), cp(W, 5, seed=3)
    assert torch.equal(one.A, two.A)
    assert torch.equal(torch.get_rng_state(), state)
    assert tensorly.get_backend() == backend


def test_cp_curve_predicts_the_fit():
    W = kernel(O=24, I=16, terms=100, decay=0.95)
    ranks = [4, 6, 9, 14, 20, 30]
    form = form_named("pw-dw-pw")
    curve = form.curve(W, ranks)
    for rank, predicted in zip(ranks, curve.errors, strict=True):
        fitted = form.factorise(W, rank, fits=curve.fits)
        assert relative_error(fitted, W) == pytest.approx(predicted, rel=0.2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_costs_are_what_runs(form, groups, stride):
    spec = ConvSpec(8, 12, (3, 5), (stride, stride), (1, 2), groups=groups)
    for components in (24, 48):
        layer = SeparableConv2d(
            8, 12, (3, 5), stride, (1, 2), groups=groups, bias=False, form=form, components=components
        )
        x = torch.randn(2, 8, 10, 12)
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        params = sum(p.numel() for p in layer.parameters())
        assert form_named(form).params(spec, components) == params
        macs = form_named(form).macs(spec, components, (10, 12), tuple(y.shape[-2:]))
        assert 2 * macs * 2 == counter.get_total_flops()  # two images; a MAC is two operations


def test_dense_costs_are_what_runs():
    conv = nn.Conv2d(8, 12, 3, 2, 1, groups=2)
    spec = ConvSpec.of(conv)
    with FlopCounterMode(display=False) as counter:
        y = conv(torch.randn(1, 8, 9, 9))
    assert 2 * spec.macs(tuple(y.shape[-2:])) == counter.get_total_flops()
    assert spec.params == sum(p.numel() for p in conv.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_most_components_saves_parameters_and_one_more_step_does_not(form):
    for spec in (ConvSpec(16, 24, (3, 3)), ConvSpec(16, 24, (3, 3), groups=4), ConvSpec(3, 64, (7, 7))):
        most = form_named(form).most_components(spec)
        assert most % spec.groups == 0
        assert form_named(form).params(spec, most) < spec.weight_params
        beyond = most + spec.groups
        assert form_named(form).params(spec, beyond) >= spec.weight_params or beyond > form_named(form).exact(spec)


def test_slice_svd_keeps_the_largest_of_each_group():
    W = kernel(2)
    svd = slice_svd(W)
    kept = svd.keep(7, even=False)
    flat = svd.values.flatten(1)
    for group in range(2):
        threshold = flat[group][kept[group]].min()
        others = flat[group][[i for i in range(flat.shape[1]) if i not in kept[group].tolist()]]
        assert others.max() <= threshold


def test_grouped_is_what_a_grouped_convolution_means():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    W = grouped(conv.weight, 2)
    assert W.shape == (2, 3, 2, 9)
    assert torch.equal(W[1, 0], conv.weight[3].flatten(1))
