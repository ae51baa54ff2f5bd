"""Factorisations from the outside: the first of a process, several at once, from an earlier fit."""

import subprocess
import sys

import pytest
import torch

from convsplit.forms import FORMS
from convsplit.lowrank import CP, cp, cp_curve, cp_each, slice_svd

FIRST_USE = """
import sys, threading
import tensorly
before = tensorly.get_backend()
import torch
from convsplit.lowrank import slice_svd
torch.set_num_threads(1)
sys.setswitchinterval(1e-6)
ready, failed = threading.Barrier(16), []
def use():
    ready.wait()
    try:
        slice_svd(torch.eye(3)[None, None])
    except BaseException as error:
        failed.append(repr(error))
threads = [threading.Thread(target=use) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
assert tensorly.get_backend() == before == "numpy", (before, tensorly.get_backend())
"""


def test_the_first_use_may_be_in_several_threads_at_once() -> None:
    runs = [subprocess.Popen([sys.executable, "-c", FIRST_USE], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for run in runs:
        message = run.communicate(timeout=300)[1]
        assert run.returncode == 0, message


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 2, None])
@pytest.mark.parametrize(("m", "n"), [(9, 40), (40, 9), (7, 7), (1, 5), (5, 1)])
def test_slices_of_any_shape_are_the_sum_of_orthonormal_triplets(
    m: int, n: int, rank: int | None, dtype: torch.dtype
) -> None:
    slices = torch.randn(2, 3, m, n, generator=torch.Generator().manual_seed(m), dtype=dtype)
    if rank is not None:
        slices = slices[..., :rank] @ torch.ones(1, 1, min(rank, n), n, dtype=dtype)
    svd = slice_svd(slices)
    q, near = min(m, n), 100 * torch.finfo(dtype).eps
    assert (svd.left.shape, svd.values.shape, svd.right.shape) == ((2, 3, m, q), (2, 3, q), (2, 3, q, n))
    size = float(slices.norm())
    assert (svd.left * svd.values.unsqueeze(2) @ svd.right - slices).norm() <= near * size
    assert (svd.values - torch.linalg.svdvals(slices)).norm() <= near * size
    assert (svd.values.diff(dim=2) <= 0).all()
    for vectors in (svd.left.mT, svd.right):
        assert torch.allclose(vectors @ vectors.mT, torch.eye(q, dtype=dtype), atol=near)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 5), (1, 80)])
def test_errors_where_channels_correlate_are_those_of_the_sum(groups: int, channels: int, even: bool) -> None:
    """Against the norm of what is left out, times the root of the correlations: exact for up to 64 channels."""
    generator = torch.Generator().manual_seed(channels)
    slices = torch.randn(groups, channels, 7, 4, generator=generator, dtype=torch.float64)
    mixing = torch.randn(groups, channels, channels + 3, generator=generator, dtype=torch.float64) + 0.5
    correlations = mixing @ mixing.mT
    sizes = correlations.diagonal(dim1=1, dim2=2).sqrt()
    correlations = correlations / sizes.unsqueeze(1) / sizes.unsqueeze(2)
    svd, counts = slice_svd(slices), [0, channels, 2 * channels, 4 * channels, 99 * channels]
    values, vectors = torch.linalg.eigh(correlations)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(1)

    def norm(kernel: torch.Tensor) -> float:
        return float(torch.einsum("gcmn,gck->gkmn", kernel, root).norm())

    found = svd.correlated_errors(counts, correlations, even=even)
    for count, error in zip(counts, found, strict=True):
        kept = torch.zeros(groups, channels * 4, dtype=torch.float64)
        kept.scatter_(1, svd.keep(min(count, 4 * channels), even=even), 1.0)
        fitted = (svd.left * (svd.values * kept.view(groups, channels, 4)).unsqueeze(2)) @ svd.right
        assert error == pytest.approx(
            norm(slices - fitted) / norm(slices), rel=1e-9 if channels <= 64 else 0.05, abs=1e-7
        )
    plain = [float(svd.errors(even=even)[count // channels if even else count]) for count in counts[:4]]
    alone = torch.eye(channels, dtype=torch.float64).expand(groups, -1, -1)
    assert svd.correlated_errors(counts[:4], alone, even=even) == pytest.approx(plain, abs=1e-7)


def kernel(O: int, I: int, K: int = 9, seed: int = 0, groups: int = 1, decay: float = 0.9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.randn(groups, n, 60, generator=generator, dtype=torch.float64) for n in (O, I, K))
    A, B, C = factors
    W = torch.einsum("r,gor,gir,gkr->goik", decay ** torch.arange(60.0, dtype=torch.float64), A, B, C)
    return W + 0.05 * torch.randn(W.shape, generator=generator, dtype=torch.float64)


def missed(fit: CP, W: torch.Tensor) -> float:
    return float((fit.kernel() - W).norm() / W.norm())


def test_fits_made_together_are_those_made_alone() -> None:
    weights, ranks = [kernel(12, 10, seed=seed) for seed in range(3)], [9, 11, 10]
    for together, W, rank in zip(cp_each(weights, ranks), weights, ranks, strict=True):
        alone = cp(W, rank)
        assert together.rank == rank
        assert together.error == pytest.approx(missed(together, W), rel=1e-4)
        assert together.error == pytest.approx(alone.error, rel=1e-3)


def test_each_fit_ends_by_itself() -> None:
    easy, hard = kernel(12, 10, decay=0.1), kernel(12, 10, decay=0.99, seed=1)
    fits = cp_each([easy, hard], [12, 12])
    alone = [cp(W, 12) for W in (easy, hard)]
    assert [fit.error for fit in fits] == pytest.approx([fit.error for fit in alone], rel=1e-3)
    assert len(set(fits[0].history[-3:])) == 1  # at rest while the other goes on


@pytest.mark.parametrize("groups", [1, 2])
def test_a_start_makes_no_fit_worse_and_is_not_lost(groups: int) -> None:
    W = kernel(24, 20, groups=groups)
    curve = cp_curve(W, [4, 8, 16, 24, 32])
    for near in curve.fits:
        assert cp(W, near.rank, start=near, iterations=3).error <= near.error * (1 + 1e-6)
    for rank in (6, 16, 28):
        start = min(curve.fits, key=lambda fit: abs(fit.rank - rank))
        assert cp(W, rank, start=start).error <= 1.05 * cp(W, rank).error


def test_a_curve_holds_no_more_than_a_few_times_the_kernel() -> None:
    for O, I, K in ((8, 8, 9), (32, 16, 9), (24, 24, 3), (16, 16, 49)):
        W = kernel(O, I, K)
        ranks = list(range(2, max(3, O * I * K // (O + I + K)), 2))
        held = sum(part.numel() for fit in cp_curve(W, ranks).fits for part in (fit.A, fit.B, fit.C))
        assert held <= 2.4 * W.numel()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_layers_together_are_layers_alone(form) -> None:  # type: ignore[no-untyped-def]
    weights = [kernel(8, 6, seed=seed) for seed in range(3)]
    counts = [12, 24] if form.name == "pw-dw-pw" else [24, 48]
    curves = form.curves(weights, counts)
    for W, curve in zip(weights, curves, strict=True):
        assert curve.errors == pytest.approx(form.curve(W, counts).errors, rel=0.02)
    together = form.factorise_each(weights, [counts[0]] * 3, fits=[curve.fits for curve in curves])
    for W, curve, factors in zip(weights, curves, together, strict=True):
        alone = form.factorise(W, counts[0], fits=curve.fits)
        assert torch.allclose(factors.kernel(8, 6), alone.kernel(8, 6), atol=0.02 * float(W.norm()))


def test_float32_ends_where_float64_does(monkeypatch: pytest.MonkeyPatch) -> None:
    W = kernel(32, 32, decay=0.5)  # close to low rank: float32 cannot see the last sweeps
    W = W - 0.999 * (W - cp(W, 24).kernel())
    fit = cp(W, 24)
    monkeypatch.setattr(sys.modules["convsplit.lowrank.canonical"], "FLOAT64_WORK", 1e9)
    assert fit.error == pytest.approx(missed(fit, W), rel=0.01)
    assert fit.error <= 1.1 * cp(W, 24).error
