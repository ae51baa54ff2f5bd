"""The metric of measured inputs, at few positions out of many: what it says of outputs holds at all of them."""

import pytest
import torch
from torch import nn

from convsplit import Budget, Study
from convsplit.data.moments import measure_marginals, sampled_outputs


def framed(images: int, channels: int) -> torch.Tensor:
    """Smooth shapes [N, I, 8, 8] in the middle of nothing, none of which is negative."""
    x = torch.rand(images, channels, 9, 9).unfold(2, 4, 1).unfold(3, 4, 1).mean((4, 5))
    return nn.functional.pad(x, (1, 1, 1, 1)) * (1 + torch.rand(images, 1, 1, 1))


@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("form", ["dw-pw", "pw-dw-pw"])
def test_predicted_errors_are_those_of_the_outputs(channels: int, form: str) -> None:
    """Without repair and about the means, which are kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, bias=False))
    x = framed(256, channels)
    known = Study(model, calibration=list(x.split(64)), forms=form)
    plan = known.plan(Budget(params=0.6))
    converted = known._rewritten(plan)
    with torch.no_grad():
        wanted, error = model(x), converted(x) - model(x)
    varied = (wanted - wanted.mean((0, 2, 3), keepdim=True)).norm()
    assert error.mean((0, 2, 3)).abs().max() < 0.05 * wanted.std()
    assert float(error.norm() / varied) == pytest.approx(plan.layers[0].option.error, rel=0.35)


@pytest.mark.parametrize("form", ["dw-pw", "pw-dw", "pw-dw-pw"])
def test_predicted_errors_are_those_of_the_outputs_where_channels_correlate(form: str) -> None:
    """Forms compete by them. A filter of differences between channels sees little of nearly grey images, and what is
    left out of each channel alone does not cancel as the whole does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 32, 3, padding=1, bias=False))
    with torch.no_grad():
        model[0].weight -= 0.95 * model[0].weight.mean(1, keepdim=True)
    x = framed(256, 1) + 0.3 * framed(256, 6)
    known = Study(model, calibration=list(x.split(64)), forms=form)
    for kept in (0.4, 0.7):
        plan = known.plan(Budget(params=kept))
        with torch.no_grad():
            wanted, error = model(x), known._rewritten(plan)(x) - model(x)
        varied = (wanted - wanted.mean((0, 2, 3), keepdim=True)).norm()
        assert float(error.norm() / varied) == pytest.approx(plan.layers[0].option.error, rel=0.35)


def test_few_positions_are_taken_from_everywhere() -> None:
    """Wherever the grid of a batch begins, several batches together see rows and columns alike, and not one border."""
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    for axis, places in enumerate((rows, rows.mT)):
        seen = torch.cat([sampled_outputs(places, (8, 8), index, (1, 1)).flatten() for index in range(8)])
        assert seen.unique().numel() >= 5, axis
        assert 2.5 < seen.mean() < 4.5, axis
    every = torch.cat([sampled_outputs(8 * rows + rows.mT, (8, 8), index, (1, 1)).flatten() for index in range(64)])
    assert every.unique().numel() == 64


def test_means_are_those_of_the_patches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2))
    x = torch.rand(8, 4, 20)
    found = measure_marginals(model, {"0": model[0]}, x.split(4))["0"]
    kernel = model[0].weight.detach().double().reshape(2, 2, 3, 3).transpose(1, 2)  # [G, O, I, K]
    with torch.no_grad():
        wanted = (model(x) - model[0].bias[:, None]).mean((0, 2)).double()
    answered = (kernel * found.means.unsqueeze(1)).sum((2, 3)).flatten()
    torch.testing.assert_close(answered, wanted, rtol=1e-4, atol=1e-5)
