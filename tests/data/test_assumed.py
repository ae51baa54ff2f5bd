"""What is assumed of inputs that nobody has shown: a metric of their own for fits without data."""

import itertools

import pytest
import torch
from torch import nn

from convsplit import Budget, Study, apply_plan
from convsplit.data.moments import NEIGHBOURS, Assumed, sampled_patches
from convsplit.spec import ConvSpec

CPU = torch.device("cpu")


def smooth(*shape: int, axes: int = 2) -> torch.Tensor:
    """Autoregressive noise [N, I, ...] along each of its last axes, of the assumed correlation."""
    x = torch.randn(*shape, dtype=torch.float64)
    for axis in range(-axes, 0):
        steps = list(x.unbind(axis))
        for before, after in itertools.pairwise(range(len(steps))):
            steps[after] = NEIGHBOURS * steps[before] + (1 - NEIGHBOURS**2) ** 0.5 * steps[after]
        x = torch.stack(steps, axis)
    return x


CONVOLUTIONS = [
    nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, (1, 5), dilation=2), nn.Conv2d(2, 4, (3, 2), stride=2),
    nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(2, 4, 5, dilation=2), nn.Conv3d(2, 4, (1, 3, 2)),
    nn.ConvTranspose2d(2, 4, 4, stride=2), nn.ConvTranspose1d(2, 4, 5, dilation=2),
    nn.ConvTranspose1d(2, 4, 6, stride=3),
]  # fmt: skip


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_it_is_what_smooth_inputs_have(conv: nn.Module) -> None:
    """Moments over the positions of patches of such inputs, for kernels of all kinds."""
    torch.manual_seed(0)
    conv = conv.double()
    spec = ConvSpec.of(conv)
    sizes = {1: (48,), 2: (48, 48), 3: (12, 12, 12)}[spec.axes]
    x = smooth(64, spec.in_channels, *sizes, axes=spec.axes)
    size = conv(x).shape[2:]
    patches = sampled_patches(conv, spec.groups, x, size, (1,) * spec.axes, 0)
    rows = patches.reshape(spec.groups, -1, spec.positions, patches.shape[2])
    found = torch.einsum("gikn,giln->gkl", rows, rows)
    found /= found.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert (found - Assumed.of(spec, CPU).positions).abs().max() < 0.05


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
def test_conversions_without_data_are_nearer_on_smooth_inputs(form: str) -> None:
    """Than the same plan in the plain metric; and the plan's error is what outputs are off by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 24, 3, bias=False)).double()
    x = smooth(64, 12, 24, 24)
    plan = Study(model, forms=form).plan(Budget(params=0.5))
    with torch.no_grad():
        wanted = model(x)
    assumed, plain = (
        float((apply_plan(model, plan, marginals=metric)(x).detach() - wanted).norm() / wanted.norm())
        for metric in (None, {})
    )
    assert assumed < plain
    assert assumed == pytest.approx(plan.layers[0].option.error, rel=0.05)


def test_exact_layers_stay_exact_to_the_last_digits() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3)).double()
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    exact = apply_plan(model, Study(model).plan(exact=True))
    assert (exact(x) - model(x)).abs().max() < 1e-12


def test_wide_kernels_are_fitted_without_loss_of_digits() -> None:
    """The metric of a kernel of many positions is well conditioned: at full rank little is lost in single precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 8, 64, bias=False))
    smaller = apply_plan(model, Study(model, forms="dw-pw").plan(rank=8))
    x = torch.randn(2, 4, 100)
    assert (smaller(x) - model(x)).norm() < 1e-5 * model(x).norm()
