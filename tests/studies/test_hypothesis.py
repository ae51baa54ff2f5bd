"""Any single convolution, drawn at random: exact at full rank, in every form, and never worse than promised.

250 cases for each of the four tests, 1,000 in all; CONVSPLIT_EXAMPLES in the environment draws more or fewer.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import convsplit
from convsplit.forms import FORMS, form_named
from convsplit.layers.separable import SeparableConv2d
from convsplit.spec import ConvSpec

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
CASES = settings(
    max_examples=int(os.environ.get("CONVSPLIT_EXAMPLES", "250")),
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

small = st.integers(1, 4)


@st.composite
def convolutions(draw: Any, groups: Any = small) -> tuple[nn.Conv2d, Tensor]:
    """A float64 convolution of any geometry that torch allows, and an input it runs on."""
    g = draw(groups)
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.one_of(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    conv = nn.Conv2d(
        g * draw(small), g * draw(small), kernel, stride, padding, dilation, g, draw(st.booleans()), mode,
        dtype=torch.float64,
    )  # fmt: skip
    if draw(st.booleans()):
        with torch.no_grad():  # dead filters and channels
            conv.weight[draw(st.integers(0, conv.out_channels - 1))] = 0
            conv.weight[:, draw(st.integers(0, conv.in_channels // g - 1))] = 0
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    x = torch.randn(*batch, conv.in_channels, draw(st.integers(1, 12)), draw(st.integers(1, 12)), dtype=torch.float64)
    if draw(st.booleans()):
        conv.to(memory_format=torch.channels_last)
    assume(runs(conv, x))
    return conv.eval(), x


def runs(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether torch takes the combination: small inputs and large paddings do not always go together."""
    try:
        conv(x)
    except (RuntimeError, ValueError):
        return False
    return True


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-3))


@CASES
@given(convolutions(), st.sampled_from(sorted(FORMS)))
def test_every_form_is_exact_at_full_rank(drawn: tuple[nn.Conv2d, Tensor], form: str) -> None:
    conv, x = drawn
    spec = ConvSpec.of(conv)
    R = form_named(form).exact(spec)
    layer = SeparableConv2d.from_conv(conv, form=form, components=R)
    assert close(layer.weight, conv.weight)
    assert close(layer(x), conv(x))
    assert close(layer.merged()(x), conv(x))
    assert (
        sum(p.numel() for p in layer.parameters()) == form_named(form).params(spec, R) + spec.out_channels * spec.bias
    )


@CASES
@given(convolutions(), st.sampled_from(["dw-pw", "pw-dw"]), st.data())
def test_any_number_of_components_runs_and_merges(drawn: tuple[nn.Conv2d, Tensor], form: str, data: Any) -> None:
    conv, x = drawn
    spec = ConvSpec.of(conv)
    R = spec.groups * data.draw(st.integers(1, form_named(form).exact(spec) // spec.groups))
    layer = SeparableConv2d.from_conv(conv, form=form, components=R)
    assert close(layer(x), layer.merged()(x))
    # A best approximation in the Frobenius norm is never farther than zero is.
    assert (layer.weight - conv.weight).norm() <= conv.weight.norm() * (1 + 1e-9)


@CASES
@given(convolutions())
def test_conversion_keeps_or_explains(drawn: tuple[nn.Conv2d, Tensor]) -> None:
    conv, x = drawn
    before = {key: value.clone() for key, value in conv.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convsplit.ConversionWarning)
        plan = convsplit.make_plan(conv, x, exact=True)
    (layer,) = plan.layers
    pointwise, depthwise = conv.kernel_size == (1, 1), 1 < conv.groups == conv.in_channels == conv.out_channels
    assert layer.split == (not pointwise and not depthwise)
    assert layer.split or layer.reason
    converted = convsplit.apply_plan(conv, plan)
    assert close(converted(x), conv(x))
    assert all(torch.equal(before[key], value) for key, value in conv.state_dict().items())


@CASES
@given(convolutions(), st.floats(0.2, 1.0))
def test_a_budget_is_kept_or_refused(drawn: tuple[nn.Conv2d, Tensor], fraction: float) -> None:
    conv, x = drawn
    try:
        plan = convsplit.make_plan(conv, x, budget=convsplit.Budget(params=fraction))
    except ValueError as error:
        if "the smallest that can" not in str(error):
            raise
        return
    before, after = plan.layers[0].params
    assert after <= before
    assert convsplit.apply_plan(conv, plan)(x).shape == conv(x).shape
