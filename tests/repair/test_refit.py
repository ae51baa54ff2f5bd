"""Label-free repair: it helps, never harms a layer, is the same for every way of walking, and refuses nonsense."""

import copy
import math
import sys
import threading
from dataclasses import replace

import pytest
import torch
from residual import SmallNet, Untraceable, images, small_net
from torch import nn

import convsplit
from convsplit import Budget, SeparableConv2d
from convsplit.data.baton import Pass
from convsplit.data.following import see_what_follows
from convsplit.data.moments import (
    LEAST_POSITIONS,
    POSITIONS_PER_UNKNOWN,
    evenly,
    padded,
    positions_wanted,
    sampled_outputs,
    sampled_patches,
    thinning,
    tile_of,
)
from convsplit.data.sensitivity import measure_sensitivity
from convsplit.data.tail import NO_TAIL, Tail
from convsplit.data.walk import Stop, walk
from convsplit.forms import FORMS, Factors, grouped
from convsplit.lowrank import cp
from convsplit.repair.fits import AllFactors, LastPointwise
from convsplit.repair.grams import Overlap
from convsplit.repair.samples import Moments, Sample, Samples, take_samples
from convsplit.repair.solve import Metric, Point, Quadratic, fit_factors, improved, quadratics


def drift(model: nn.Module, converted: nn.Module, inputs: torch.Tensor) -> float:
    return convsplit.compare(converted, model, inputs).drift.relative


def converted_net(cls=SmallNet, form=tuple(FORMS), fraction=0.3):
    model = small_net(cls)
    return model, convsplit.convert(model, budget=Budget(params=fraction), forms=form)


@pytest.mark.parametrize("form", [*FORMS, tuple(FORMS)], ids=str)
def test_repair_lowers_the_drift_and_no_layer_gets_worse(form):
    model, converted = converted_net(form=form, fraction=0.4)
    before = drift(model, converted, images(64, seed=1))
    repaired = convsplit.refit(converted, model, list(images(128).split(32)))
    assert drift(model, converted, images(64, seed=1)) < 0.8 * before
    split = {name for name, m in converted.named_modules() if isinstance(m, SeparableConv2d)}
    assert split <= {layer.name for layer in repaired}
    assert all(layer.after <= layer.before * (1 + 1e-6) for layer in repaired)


def test_the_ridge_goes_by_the_number_of_inputs():
    """However they are dealt out: with the fewer inputs, the stronger is the pull towards the original weights."""
    model, converted = converted_net(form="dw-pw")

    def repaired(batches, **options) -> torch.Tensor:
        twin = copy.deepcopy(converted)
        convsplit.refit(twin, model, batches, **options)
        return torch.cat([value.flatten() for value in twin.state_dict().values()])

    for batches, ridge in ((images(16), 1.0), (images(128), 0.5), (list(images(128).split(32)), 0.5)):
        assert torch.equal(repaired(batches), repaired(batches, ridge=ridge))
        assert not torch.equal(repaired(batches), repaired(batches, ridge=0.1 * ridge))


def test_more_stages_repair_more():
    model, converted = converted_net()
    drifts = []
    for stages in ("bias", "last", "all"):
        twin = copy.deepcopy(converted)
        convsplit.refit(twin, model, images(128), stages=stages)
        drifts.append(drift(model, twin, images(128)))
    bias, last, everything = drifts
    assert everything < 0.8 * min(bias, last)
    assert max(bias, last) < drift(model, converted, images(128))


def test_the_last_stage_is_the_least_squares_solution():
    conv = nn.Conv2d(6, 8, 3, padding=1, stride=2)
    layer = SeparableConv2d.from_conv(conv, form="dw-pw", rank=1)
    x = torch.randn(32, 6, 9, 9)
    convsplit.refit(layer, conv, x, stages="last", ridge=1e-9)
    features = layer.depthwise(x).transpose(0, 1).flatten(1)
    design = torch.cat([features, torch.ones(1, features.shape[1])]).T
    oracle = torch.linalg.lstsq(design, conv(x).transpose(0, 1).flatten(1).T).solution
    torch.testing.assert_close(layer.pointwise_out.weight.flatten(1), oracle[:-1].T, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.bias, oracle[-1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": (2, 4), "padding": "same"},
    ],
    ids=str,
)
def test_every_geometry(form, groups, geometry):
    conv = nn.Conv2d(8, 12, **{"kernel_size": 3, **geometry}, groups=groups)
    layer = SeparableConv2d.from_conv(conv, form=form, components=24 if groups == 1 else 20)
    x = torch.randn(32, 8, 9, 9).relu()
    before = (layer(x) - conv(x)).norm()
    convsplit.refit(layer, conv, x)
    assert (layer(x) - conv(x)).norm() < before


def test_patches_are_what_a_convolution_sees():
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False)
    x = torch.randn(8, 4, 9, 9)
    samples = take_samples(conv, Stop("", 1, lambda: iter([(x, conv(x), None)])), 2)
    moments = Moments.of(samples).towards(samples, samples.targets())
    problems = quadratics(grouped(conv.weight.detach() * 0, 2), moments, Metric.of(moments, (3, 2), 1e-9))
    best = torch.cat([problem.best for problem in problems])
    torch.testing.assert_close(best.float(), grouped(conv.weight.detach(), 2).flatten(0, 1), rtol=1e-3, atol=1e-4)
    assert padded(conv, x).shape == (8, 4, 11, 9)


def test_moments_are_those_of_all_positions(monkeypatch):
    monkeypatch.setattr(
        sys.modules["convsplit.repair.grams"], "LEAST_BLOCK", 7
    )  # blocks of a moment, the last smaller
    parts = [(torch.randn(2, 20, 30), torch.randn(2 * 5, 30)) for _ in range(3)]
    samples = Samples([Sample(x, y, y) for x, y in parts], NO_TAIL)
    moments = Moments.of(samples).towards(samples, samples.targets())
    x, y = (torch.cat(each, -1).double() for each in zip(*parts, strict=True))
    for group in range(2):
        both = torch.cov(torch.cat([x[group], y[5 * group : 5 * group + 5]]), correction=0)
        torch.testing.assert_close(moments.patches[group], both[:20, :20], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.cross[group], both[20:, :20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_far_from_zero_are_repaired_as_well(form):
    """Their variance is a millionth of their squares, and products of float32 would not know it."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(12, 12, 1 if form == "pw-pw" else 3), torch.randn(64, 12, 8, 8)
    left = []
    for shift in (0.0, 1000.0):
        layer = SeparableConv2d.from_conv(conv, form=form, components=6 if form == "pw-pw" else 24)
        convsplit.refit(layer, conv, x + shift)
        with torch.no_grad():
            left.append(float((layer(x + shift) - conv(x + shift)).norm()))
    assert left[1] < 1.1 * left[0]


@pytest.mark.parametrize("ceiling", [None, math.inf, 6.0])
def test_moments_towards_the_nearest_answers_are_those_of_them(ceiling, monkeypatch):
    """Also where a batch is worked on in pieces; and how far the current answers are from them."""
    monkeypatch.setattr(sys.modules["convsplit.repair.samples"], "PIECE", 13)
    torch.manual_seed(0)
    tail = Tail(torch.randn(6), torch.randn(6), ceiling=ceiling)
    parts = [Sample(torch.randn(2, 8, 40), y := torch.randn(6, 40), tail.answer(y, None)) for _ in range(3)]
    samples = Samples(parts, tail)
    kernel, bias = torch.randn(2, 3, 8, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    answers = [(kernel.flatten(2).float() @ part.patches).flatten(0, 1) + bias.float()[:, None] for part in parts]
    nearest = [y.clamp(*ends) for y, ends in zip(answers, samples.equal_answers, strict=True)]
    found, missed = Moments.of(samples).towards_nearest(samples, kernel, bias)
    wanted = Moments.of(samples).towards(samples, nearest)
    torch.testing.assert_close(found.cross, wanted.cross, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.target_mean, wanted.target_mean, rtol=1e-5, atol=1e-6)
    assert missed == pytest.approx(
        sum(float((y - z).square().sum()) for y, z in zip(answers, nearest, strict=True)), 1e-4
    )


@pytest.mark.parametrize(("hw", "images"), [((56, 56), 64), ((257, 1), 64), ((1, 3000), 8), ((2, 2), 4), ((1, 1), 1)])
def test_positions_are_thinned_out_to_what_is_wanted(hw, images):
    for unknowns, limit in ((144, 1 << 20), (4, 1 << 30)):
        wanted = positions_wanted(unknowns, unknowns, limit)
        assert wanted == min(max(POSITIONS_PER_UNKNOWN * unknowns, LEAST_POSITIONS), limit / (4 * unknowns))
        apart = thinning(hw, images, wanted)
        kept = images * -(-hw[0] // apart[0]) * -(-hw[1] // apart[1])
        assert all(1 <= step <= side for step, side in zip(apart, hw, strict=True))
        assert kept >= min(0.5 * wanted, images * hw[0] * hw[1])
        assert kept <= max(2 * wanted, images) + images


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("images", [1, 16, 40])
def test_patches_and_outputs_are_of_the_same_positions(images, transposed):
    """Also of batches whose images share several grids, which need not have equally many positions."""
    torch.manual_seed(0)
    conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(images, 4, 11, 10)
    with torch.no_grad():
        wanted = conv(x)
        kernel, size = grouped(conv.weight, 2, transposed).flatten(2), wanted.shape[2:]
        for batch in range(3):
            patches = sampled_patches(conv, 2, x, size, (3, 2), batch)
            outputs = sampled_outputs(wanted, (3, 2), batch, tile_of(conv))
            torch.testing.assert_close((kernel @ patches).flatten(0, 1), outputs)


def test_batches_have_the_numbers_that_they_would_have_in_one_process(monkeypatch):
    """Which positions are left when they are thinned out goes by these."""
    conv, x = nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4)
    values = [(x, conv(x).detach(), None)] * 3

    def numbers():
        return [sample.batch for sample in take_samples(conv, Stop("", 3, lambda: iter(values)), 1).batches]

    assert numbers() == [0, 1, 2]
    monkeypatch.setattr("convsplit.data.moments.is_shared", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert numbers() == [1, 3, 5]


def test_layers_of_few_components_are_looked_at_through_all_their_inputs(monkeypatch):
    """What patches cost depends on the inputs, how many are enough on the components where those are fewer."""
    monkeypatch.setattr("convsplit.data.moments.LEAST_POSITIONS", 1000)
    x = torch.randn(4, 64, 40, 40)
    conv = nn.Conv2d(64, 8, 3, padding=1)
    taken = {}
    for components in (2, 200):
        layer = SeparableConv2d.from_conv(conv, form="pw-dw-pw", components=components)
        fit = AllFactors(layer, grouped(conv.weight.detach(), 1), fresh=True, seed=0)
        (taken[components],) = fit.take(Stop("", 1, lambda: iter([(x, conv(x).detach(), None)]))).batches
    assert 1000 < taken[2].positions < taken[200].positions == x[:, 0].numel()
    assert taken[2].overlap is None
    assert taken[200].overlap == Overlap((3, 3), (1, 1), (40, 40))


@pytest.mark.parametrize(("count", "wanted"), [(640, 50), (640, 300), (9, 4), (1, 5), (640, 641)])
def test_some_of_the_positions_are_those_of_all(count, wanted):
    """Patches, answers and what is added at the same positions, about as many of them as wanted."""
    place = torch.arange(8.0 * count).reshape(8, count)
    parts = [
        Sample(row.expand(2, 3, -1), row.expand(4, -1), row[None], -row[None], batch=batch)
        for batch, row in enumerate(place)
    ]
    some = Samples(parts, NO_TAIL).thinned(wanted)
    kept = torch.cat([sample.answers[0] for sample in some.batches])
    assert len(kept) == (8 * count if 2 * wanted > 8 * count else pytest.approx(wanted, rel=0.2, abs=2))
    assert len(kept.unique()) == len(kept)
    for sample in some.batches:
        for each in (*sample.patches.flatten(0, 1), *sample.answers, sample.wanted[0], -sample.added[0]):
            assert torch.equal(each, sample.answers[0])


@pytest.mark.parametrize("width", [2, 5, 8, 16])
def test_some_of_the_positions_are_of_all_columns(width):
    """Also where their number divides the step, in many images at once and in one for each batch."""
    for chosen in (evenly(64 * width * width, width, 0), torch.cat([evenly(width**2, width, n) for n in range(64)])):
        columns = torch.bincount(chosen % width, minlength=width)
        assert columns.min() > 0.6 * columns.max()


def test_kernels_of_many_unknowns_are_as_good_as_in_float64():
    """Factors begin near the best kernel; a dense one is as precise as S allows."""
    problem = problem_of(O=4, I=70, alike=False)
    assert problem.metric.narrow.dtype == torch.float32
    wanted = torch.linalg.solve(problem.metric.S, problem.pull.flatten(1).T).T.reshape(problem.pull.shape)
    near, best = ((each - wanted).norm() / wanted.norm() for each in (problem.nearly_best, problem.best))
    assert 1e-9 < near < 1e-3
    assert best < 1e-3 * near


def problem_of(O: int = 6, I: int = 5, kernel_size: tuple[int, ...] = (3, 3), alike: bool = True) -> Quadratic:
    """The quadratic of a layer whose inputs are correlated, those of all positions `alike` or not."""
    K = math.prod(kernel_size)
    mixing = torch.randn(I * K, I * K, dtype=torch.float64)
    S = mixing @ mixing.T / (I * K) + 0.1 * torch.eye(I * K)
    if alike:
        S = moments_of_smooth_maps(I, kernel_size) + 0.1 * torch.eye(I * K)
    weights = torch.randn(O, O, dtype=torch.float64)
    kernel = torch.randn(O, I, K, dtype=torch.float64)
    pull = (kernel.flatten(1) @ S).reshape(kernel.shape)
    return Quadratic(Metric(S, torch.tensor(0.0), kernel_size), pull, weights @ weights.T + torch.eye(O))


def moments_of_smooth_maps(I: int, kernel_size: tuple[int, ...]) -> torch.Tensor:
    """S of maps that correlate the less the farther apart, one mixture of channels less than another."""
    taps = torch.cartesian_prod(*map(torch.arange, kernel_size)).view(-1, len(kernel_size))
    distance = (taps.unsqueeze(1) - taps).abs().sum(2).double()
    mixtures = torch.randn(2, I, I, dtype=torch.float64) / I**0.5
    parts = zip(mixtures @ mixtures.mT, (0.3, 0.9), strict=True)
    return sum((torch.kron(channels, at_one**distance) for channels, at_one in parts), torch.zeros(()))


def energy(problem: Quadratic, factors: Factors) -> float:
    """E by its definition."""
    W = factors.kernel(*problem.pull.shape[:2])[0].flatten(1)
    return float(torch.trace(problem.F @ W @ (problem.metric.S @ W.T - 2 * problem.pull.flatten(1).T)))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_alternation_lowers_the_error_and_says_how_far(form, alike):
    torch.manual_seed(0)
    problem = problem_of(alike=alike)
    if not FORMS[form].projects:
        problem = replace(problem, F=torch.eye(6, dtype=torch.float64))
    conv = nn.Conv2d(5, 6, 3, bias=False)
    conv.weight.data.copy_(problem.best.reshape(6, 5, 3, 3))
    start = SeparableConv2d.from_conv(conv, form=form, components={"dw-pw": 10, "pw-dw": 12}.get(form, 8))
    factors = start.factors().to(torch.float64)
    losses = [energy(problem, factors)]
    start = Point.of(problem, factors)
    for sweeps in (0, 1, 4, 16):
        found = improved(problem, start, sweeps, tolerance=0.0)
        assert found.loss == pytest.approx(energy(problem, found.factors), rel=1e-6)
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[1]
    assert losses[-1] > -problem.constant


@pytest.mark.parametrize("form", FORMS)
def test_at_full_rank_the_fit_is_the_best_dense_kernel(form):
    torch.manual_seed(0)
    problem = problem_of()
    conv = nn.Conv2d(5, 6, 3).double()
    layer = SeparableConv2d.from_conv(conv, form=form, components=30)
    fitted = fit_factors(problem, FORMS[form], layer.factors(), even=False)
    torch.testing.assert_close(fitted.kernel(6, 5)[0], problem.best, rtol=1e-3, atol=1e-3)


def test_wide_layers_are_fitted_in_single_precision_as_in_double(monkeypatch):
    torch.manual_seed(0)
    problem = problem_of(O=8, I=60)
    conv = nn.Conv2d(60, 8, 3, bias=False)
    conv.weight.data.copy_(problem.best.reshape(8, 60, 3, 3))
    factors = SeparableConv2d.from_conv(conv, form="pw-dw-pw", components=6).factors().to(torch.float64)
    narrow = improved(problem, Point.of(problem, factors), 4)
    monkeypatch.setattr(sys.modules["convsplit.repair.solve"], "WIDE", 1000)
    again = replace(problem, metric=replace(problem.metric))  # nothing is known of it yet
    wide = improved(again, Point.of(again, factors), 4)
    assert (narrow.SM.dtype, wide.SM.dtype) == (torch.float32, torch.float64)
    assert narrow.factors.outputs.dtype == torch.float64
    assert narrow.loss == pytest.approx(wide.loss, rel=1e-5)


@pytest.mark.parametrize("target", ["layer", "activation"])
def test_control_flow_and_batches_of_other_sizes_change_nothing(target):
    inputs = list(images(64).split(16))
    repaired = []
    for cls, data in ((SmallNet, inputs), (Untraceable, inputs), (SmallNet, (*inputs[0].split(8), *inputs[1:]))):
        model, converted = converted_net(cls)
        convsplit.refit(converted, model, list(data), target=target)
        repaired.append(converted)
    for one, other in zip(repaired[0].parameters(), repaired[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert drift(repaired[0], repaired[2], images(64, seed=1)) < 0.1  # the grids of positions differ


def stops_of(model: nn.Module, batches: list, names: list[str], *, limit: float = math.inf):
    """The names of all stops and how many calls there were at each."""
    with torch.no_grad():
        stops = walk(model, copy.deepcopy(model), names, (), batches, None, limit)
        return [(stop.name, stop.calls, len(list(stop.values()))) for stop in stops]


def walking() -> int:
    """How many forward passes are under way in threads of their own."""
    return sum(thread.name.startswith("convsplit") for thread in threading.enumerate())


class Branches(nn.Module):
    """Takes one of two ways, by its input."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.bright, self.dark = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        if x.sum() > 1e6:
            raise ArithmeticError("too bright")
        return self.last(torch.relu((self.bright if x.mean() > 0 else self.dark)(self.first(x))))


def test_batches_go_different_ways_and_meet_again():
    data = [torch.ones(1, 3, 12, 12), -torch.ones(2, 3, 12, 12), torch.ones(3, 3, 12, 12)]
    found = stops_of(Branches(), data, ["last", "bright", "dark", "first"])
    assert found == [("first", 3, 3), ("dark", 1, 1), ("bright", 2, 2), ("last", 3, 3)]
    assert walking() == 0


def test_where_memory_is_short_batches_join_in_later():
    shrinking = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AvgPool2d(8), nn.Conv2d(16, 4, 1))
    data = list(torch.zeros(8, 3, 34, 34).split(1))
    room_for_two = 2 * 2 * 4 * 16 * 32**2 - 1
    found = stops_of(shrinking, data, ["0", "2"], limit=room_for_two)
    assert found == [("0", 2, 2), ("2", 8, 8)]
    assert stops_of(shrinking, data, ["0", "2"], limit=0)[0] == ("0", 1, 1)
    assert walking() == 0


def hooks(*models: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def test_an_error_of_the_model_says_where_and_leaves_nothing_behind():
    model, x = Branches(), torch.ones(1, 3, 9, 9)
    converted = copy.deepcopy(model)
    converted.bright = nn.Conv2d(5, 4, 1)
    wrong = r"module 'bright' \(Conv2d\) got \(1, 4, 7, 7\)"
    bright = "ArithmeticError: 'too bright'"
    for other, data, message in ((copy.deepcopy(model), [x, 1e6 * x], bright), (converted, [x] * 3, wrong)):
        stops = walk(model, other, ["first", "last"], (), data, None, math.inf)
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            list(stops)
        assert walking() == 0
        assert hooks(model, other) == 0


def test_an_interrupted_repair_leaves_whole_layers(monkeypatch):
    model, converted = converted_net()
    twin = copy.deepcopy(converted)
    convsplit.refit(twin, model, list(images(64).split(16)))
    before, stored = copy.deepcopy(converted), []
    for kind in (AllFactors, LastPointwise):

        def interrupted(self, bias, store=kind.store):
            if len(stored) == 2:
                raise KeyboardInterrupt
            stored.append(self.layer.depthwise)  # the stages are the model's own, the layer is that of a copy
            store(self, bias)

        monkeypatch.setattr(kind, "store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convsplit.refit(converted, model, list(images(64).split(16)), dense=False)
    for name, layer in converted.named_modules():
        if isinstance(layer, SeparableConv2d):
            same_as = twin if layer.depthwise in stored else before
            assert torch.equal(layer.weight, same_as.get_submodule(name).weight)
    assert len(stored) == 2
    assert walking() == 0
    assert hooks(model, converted) == 0


def test_a_pass_takes_over_the_modes_of_its_thread():
    def modes():
        return (
            torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), torch.empty(0).device,
        )  # fmt: skip

    found = []
    half = torch.autocast("cpu", torch.float16)
    for context in (torch.no_grad(), torch.inference_mode(), half, torch.device("meta")):
        with context:
            Pass(lambda: found.append(modes())).advance()
            assert found[-1] == modes()


class Tails(nn.Module):
    """A convolution before each kind of tail."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain, self.normed, self.branch, self.last = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norm, self.other_norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = nn.functional.relu6(self.norm(self.normed(x)))
        y = self.other_norm(self.branch(x))
        y += self.down(x)
        return self.last(nn.functional.silu(self.plain(torch.relu_(y))))


def followers(model: nn.Module, batch: torch.Tensor) -> dict[str, tuple[bool, str, float | None]]:
    """Of each convolution: whether batch norm follows, where the shortcut is had from, and the ceiling of ReLU."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        tails = see_what_follows(model, names, batch, None).tails
    return {
        name: (
            tail.scale is not None,
            " ".join(each.place.module for each in tail.needs() if each.place),
            tail.ceiling,
        )
        for name, tail in tails.items()
    }


def test_tails_are_found_for_what_they_are():
    model, infinity = Tails().eval(), float("inf")
    assert followers(model, torch.randn(2, 3, 9, 9)) == {
        "stem": (False, "", infinity),
        "normed": (True, "", 6.0),
        "branch": (True, "branch", infinity),
        "down": (False, "other_norm", infinity),
        "plain": (False, "", None),
        "last": (False, "", None),
    }
    with torch.no_grad():
        tail = see_what_follows(model, ["normed"], torch.randn(2, 3, 9, 9), None).tails["normed"]
    y = torch.randn(8, 50)
    torch.testing.assert_close(tail.question(tail.answer(y, None), None, otherwise=y), y)


@pytest.mark.parametrize("ceiling", [None, math.inf, 6.0])
def test_answers_are_equal_where_the_activation_makes_them_so(ceiling):
    """Of those the nearest is the clamped one; where batch norm gives nearly nothing the layer keeps its own."""
    torch.manual_seed(0)
    scale = torch.tensor([1.0, -2.0, 0.5, 1e-9])
    tail = Tail(scale, torch.randn(4), ceiling=ceiling)
    wanted, added, current = (8 * torch.randn(4, 500) for _ in range(3))
    own = torch.randn(4, 500)
    least, largest = tail.equal_answers(wanted, added, otherwise=own)
    assert (least <= largest).all()
    assert torch.equal(least[3], own[3])
    assert torch.equal(largest[3], own[3])
    for answer in (current.clamp(least, largest), least.clamp_min(-50), largest.clamp_max(50)):
        passed = tail.activated(tail.answer(answer.clamp(least, largest), added))
        torch.testing.assert_close(passed[:3], tail.activated(wanted)[:3], rtol=1e-4, atol=1e-4)
    free = (least < current) & (current < largest)
    assert bool(free.any()) == (ceiling is not None)
    for end, direction in ((least, -0.01), (largest, 0.01)):  # a little further it is another answer
        apart = (tail.activated(tail.answer(end + direction, added)) - tail.activated(wanted)).abs()
        assert (apart[:3] > 1e-3)[end[:3].isfinite()].all()


class Awkward(nn.Module):
    """Answers that are read twice, returned, changed in place, or added to what comes too late."""

    def __init__(self):
        super().__init__()
        self.twice, self.returned, self.added, self.late = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norm, self.split = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.norm(self.twice(x))
        z = self.returned(torch.relu(y)) + y.mean()
        r = torch.relu(z)
        a = self.added(r)
        r.add_(1)  # a shortcut that is no longer what went into the layer
        a = torch.relu(a + r)
        late = self.late(a)
        return {"z": z, "out": torch.relu(late + torch.nn.functional.pad(self.split(a)[:, :2], (0, 0, 0, 0, 0, 1)))}


def test_tails_end_where_somebody_else_reads_the_value():
    torch.manual_seed(0)
    model, x = Awkward().eval(), torch.randn(2, 3, 9, 9)
    found = followers(model, x)
    assert found["twice"] == (True, "", None)
    assert found["returned"] == (False, "", None)
    assert found["added"][1:] == ("added", float("inf"))
    assert found["late"][1:] == ("late", float("inf"))


class Again(nn.Module):
    """A shortcut that comes from a module which is called once more, on other shapes, before it is added."""

    def __init__(self):
        super().__init__()
        self.stem, self.next, self.other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.mix, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6()

    def forward(self, x):
        x = self.act(self.stem(x))
        y = self.act(self.mix(self.next(x)))
        return torch.relu(self.other(y[:, :3]) + x)


@pytest.mark.parametrize("cls", ["Awkward", "Bottleneck", "Tails", "SmallNet", "Again"])
def test_shortcuts_are_what_will_be_added(cls, monkeypatch):
    """Taken before the layer answers, they give what the model then rectifies."""
    torch.manual_seed(0)
    model, rectified, found = globals()[cls]().eval(), [], 0
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for owner, name in ((torch, "relu"), (torch, "relu_"), (nn.functional, "relu")):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda x, f=function: rectified.append(x.clone()) or f(x))
    with torch.no_grad():
        stops = list_of_values(walk(model, copy.deepcopy(model), names, (), [images(3)], None, math.inf))
        model(images(3))
    for tail, answer, shortcut in stops:
        z = tail.answer(answer.transpose(0, 1).flatten(1), shortcut.transpose(0, 1).flatten(1))
        flat = [x.transpose(0, 1).flatten(1) for x in rectified]
        assert any(x.shape == z.shape and torch.allclose(x, z, atol=1e-5) for x in flat)
        found += 1
    assert found


def list_of_values(stops) -> list:
    """Tail, answer and shortcut of each stop that has one; it is the same in both models, which are equal."""
    found = []
    for stop in stops:
        for _, answer, shortcuts in stop.values():
            if shortcuts is not None:
                assert torch.equal(*shortcuts)
                found.append((stop.tail, answer.clone(), shortcuts[0].clone()))
    return found


def test_what_follows_a_layer_makes_the_better_target():
    data = list(images(512).split(64))  # enough, so that targets are compared and not choices of images
    drifts = {"none": 0.0, "layer": 0.0, "activation": 0.0}
    for seed in range(5):
        torch.manual_seed(seed)
        model = Tails().eval()
        for norm in (model.norm, model.other_norm):
            norm.running_mean.normal_(), norm.weight.data.uniform_(0.5, 2), norm.bias.data.normal_()
        converted = convsplit.convert(model, budget=Budget(params=0.4))
        drifts["none"] += drift(model, converted, images(64, seed=1))
        for target in ("layer", "activation"):
            twin = copy.deepcopy(converted)
            repaired = convsplit.refit(twin, model, data, target=target)
            drifts[target] += drift(model, twin, images(64, seed=1))
            assert {"down"} < {layer.name for layer in repaired}
    assert drifts["activation"] < 0.99 * drifts["layer"] < 0.5 * drifts["none"]  # about 0.92 and 0.1


def test_dense_layers_make_good_what_was_lost_before_them():
    model = small_net()
    converted = convsplit.convert(model, budget=Budget(params=0.15), skip=["blocks.1.*", "down"])
    drifts = []
    for dense in (False, True):
        twin = copy.deepcopy(converted)
        convsplit.refit(twin, model, images(128), dense=dense)
        drifts.append(drift(model, twin, images(128)))
    assert drifts[1] < drifts[0]


def test_recalibration_gives_the_statistics_of_the_data():
    model = small_net()
    twin, state = copy.deepcopy(model).train(), torch.get_rng_state()
    data = list(images(128).split(32))
    convsplit.repair.recalibrate(twin, (batch for batch in data))
    assert all(module.training for module in twin.modules())
    assert torch.equal(torch.get_rng_state(), state)
    norm, before = twin.blocks[0].bn1, model.blocks[0].bn1
    assert norm.momentum == before.momentum
    reaching = torch.cat([model.blocks[0].conv1(torch.relu(model.stem(batch))) for batch in data])
    torch.testing.assert_close(norm.running_mean, reaching.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="no batches"):
        convsplit.repair.recalibrate(twin, [])


def test_sensitivity_is_the_metric_of_the_outputs():
    """On a linear network the moments of gradients are those of the matrix that follows."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False)).double().eval()
    follows = model[1].weight.detach().flatten(1)
    wanted = follows.T @ follows
    batches = [torch.randn(16, 3, 8, 8, dtype=torch.float64) for _ in range(16)]
    found = measure_sensitivity(model, ["0"], batches)["0"]
    torch.testing.assert_close(found, wanted / wanted.diagonal().mean(), rtol=0.1, atol=0.05)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_without_gradients_is_repaired_all_the_same():
    class Labels(SmallNet):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    model = small_net(Labels)
    assert measure_sensitivity(model, ["blocks.0.conv1"], [images(4)]) == {}
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    assert all(layer.after <= layer.before for layer in convsplit.refit(converted, model, images(64)))


def test_untraceable_models_shared_layers_and_other_inputs():
    model, converted = converted_net(Untraceable)
    before = drift(model, converted, images())
    batches = ([batch, torch.zeros(16)] for batch in images(64).split(16))  # a generator of images and labels
    convsplit.refit(converted, model, batches, forward=lambda m, batch: m(batch[0]))
    assert drift(model, converted, images()) < before

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x, scale=None):
            y = torch.relu_(self.conv(x))
            return {"out": self.conv(y) if scale is None else scale * self.conv(y)}

    model = Twice()
    converted = convsplit.convert(model, rank=1, forms="dw-pw")
    before = drift(model, converted, torch.randn(8, 8, 6, 6))
    convsplit.refit(converted, model, [{"x": torch.randn(8, 8, 6, 6)} for _ in range(4)])
    assert drift(model, converted, torch.randn(8, 8, 6, 6)) < before


def test_calibration_in_convert_chooses_and_repairs():
    model = small_net()
    data = list(images(128).split(32))
    budget = Budget(params=0.3)
    plain = convsplit.convert(model, images(), budget=budget)
    calibrated = convsplit.convert(model, images(), budget=budget, calibration=(batch for batch in data))
    assert drift(model, calibrated, images(64, seed=1)) < 0.7 * drift(model, plain, images(64, seed=1))


@pytest.mark.parametrize(
    "data",
    [images(8), [images(3), images(5), images(1)]],
    ids=["eight", "uneven"],
)
def test_poor_data_does_no_damage(data):
    model, converted = converted_net()
    before = drift(model, converted, images(64, seed=1))
    convsplit.refit(converted, model, data)
    assert all(p.isfinite().all() for p in converted.parameters())
    assert drift(model, converted, images(64, seed=1)) < 1.5 * before


def test_inputs_that_never_change():
    model, converted = converted_net()
    with pytest.warns(convsplit.ConversionWarning, match="no variance"):
        convsplit.refit(converted, model, torch.ones(8, 3, 12, 12))
    assert all(p.isfinite().all() for p in converted.parameters())
    assert drift(model, converted, torch.ones(2, 3, 12, 12)) < 0.05


def test_integer_inputs():
    class Bytes(SmallNet):
        def forward(self, x):
            return super().forward(x.float() / 128 - 1)

    model = small_net(Bytes)
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    data = torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8)
    before = drift(model, converted, data)
    convsplit.refit(converted, model, data)
    assert drift(model, converted, data) < before


def test_dead_channels():
    model = small_net()
    model.blocks[0].conv1.weight.data[:4] = 0
    model.blocks[0].bn1.weight.data[:6] = 0
    converted = convsplit.convert(model, budget=Budget(params=0.4), calibration=images(64))
    assert converted(images()).isfinite().all()


def test_modes_and_the_original_stay_as_they_were():
    model, converted = converted_net()
    model.train(), converted.train()
    before = copy.deepcopy(model.state_dict())
    norms = copy.deepcopy(converted.blocks[0].bn1.state_dict())
    state = torch.get_rng_state()
    convsplit.refit(converted, model, images(32))
    assert model.training and converted.training  # noqa: PT018
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(norms[key], value) for key, value in converted.blocks[0].bn1.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in converted.parameters())


def test_the_repaired_model_saves_and_merges(tmp_path):
    model, converted = converted_net()
    convsplit.refit(converted, model, images(64))
    convsplit.save(converted, tmp_path / "model.safetensors")
    loaded = convsplit.load(tmp_path / "model.safetensors", small_net(seed=5))
    torch.testing.assert_close(loaded(images()), converted(images()))
    torch.testing.assert_close(convsplit.merge(converted)(images()), converted(images()), rtol=1e-3, atol=1e-4)


def test_nonsense_is_refused():
    model, converted = converted_net()
    with pytest.raises(ValueError, match="no batches"):
        convsplit.refit(converted, model, [])
    poisoned = [images(2), images(2) * float("nan")]
    with pytest.raises(ValueError, match="batch 1 holds NaN"):
        convsplit.refit(converted, model, poisoned)
    with pytest.raises(ValueError, match="stages='most'; want one of 'all', 'last', 'bias'"):
        convsplit.refit(converted, model, images(), stages="most")
    with pytest.raises(ValueError, match="target='output'; want one of 'activation', 'layer'"):
        convsplit.refit(converted, model, images(), target="output")
    with pytest.raises(ValueError, match="not its conversion"):
        convsplit.refit(converted, nn.Sequential(nn.Conv2d(3, 3, 3)), images())
    with pytest.raises(ValueError, match="got"):
        convsplit.refit(converted, model, torch.randn(2, 1, 12, 12))


@pytest.mark.parametrize("stages", ["all", "last"])
@pytest.mark.parametrize("form", FORMS)
def test_layers_too_wide_for_closed_form_are_repaired_at_their_end(form, stages, monkeypatch):
    """Audio networks have kernels of 64 positions over 1,024 channels: moments of their patches would take 34 GB."""
    monkeypatch.setattr(sys.modules["convsplit.repair.fits"], "MOST_UNKNOWNS", 20)
    model, converted = converted_net(form=form)
    split = {name for name, module in converted.named_modules() if isinstance(module, SeparableConv2d)}
    before = drift(model, converted, images(64, seed=1))
    repaired = convsplit.refit(converted, model, images(128), stages=stages)
    assert drift(model, converted, images(64, seed=1)) < 0.9 * before
    assert {layer.name for layer in repaired} == split
    assert all(layer.after <= layer.before for layer in repaired)


def test_repair_in_one_pass(monkeypatch):
    """Each batch goes through both models once, but for what is looked at beforehand."""
    model, converted = converted_net(Untraceable)
    calls = {"original": 0, "converted": 0}
    for name, each in (("original", model), ("converted", converted)):
        each.stem.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    convsplit.refit(converted, model, list(images(64).split(8)), target="layer")
    assert calls == {"original": 8 + 2, "converted": 8}


class Bottleneck(nn.Module):
    """A block whose last convolution and whose shortcut both stay dense: what each adds to is the other's answer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.reduce, self.middle = nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.expand, self.shortcut = nn.Conv2d(8, 32, 1, bias=False), nn.Conv2d(16, 32, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (8, 8, 32, 32))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.norms[0](self.reduce(x)))
        y = torch.relu(self.norms[1](self.middle(y)))
        y = self.norms[2](self.expand(y))
        return torch.relu(y + self.norms[3](self.shortcut(x)))


def test_blocks_whose_shortcut_has_a_convolution_of_its_own():
    torch.manual_seed(0)
    model = Bottleneck().eval()
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    before = drift(model, converted, images(64, seed=1))
    repaired = convsplit.refit(converted, model, list(images(64).split(16)))
    assert {"middle", "expand", "shortcut"} <= {layer.name for layer in repaired}
    assert drift(model, converted, images(64, seed=1)) < 0.95 * before


def test_a_model_without_split_layers_is_left_as_it_is_and_says_so():
    model, pruned = small_net(), small_net()
    before = {key: value.clone() for key, value in pruned.state_dict().items()}
    with pytest.warns(convsplit.ConversionWarning, match="has none"):
        assert convsplit.refit(pruned, model, images()) == ()
    assert all(torch.equal(value, before[key]) for key, value in pruned.state_dict().items())
    convsplit.convert(model, images(), skip=["*"], calibration=images())  # the plan has told of that


def test_time_is_kept_and_said():
    model, converted = converted_net()
    before = copy.deepcopy(converted)
    with pytest.warns(convsplit.progress.ConversionWarning, match="ended after 0 s: 0 layers are repaired"):
        assert convsplit.refit(converted, model, list(images(64).split(16)), seconds=0) == ()
    assert same_weights(before, converted)
    assert len(convsplit.refit(converted, model, list(images(64).split(16)), seconds=1000)) >= 6
    assert walking() == 0


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_fit_at_hand_is_begun_with():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 12, 3), torch.randn(64, 8, 9, 9)
    good = cp(grouped(conv.weight.detach(), 1), 30, iterations=200)
    errors = []
    for starts in ({}, {"": [good]}):
        layer = SeparableConv2d.from_conv(conv, form="pw-dw-pw", rank=30)
        for p in layer.parameters():
            p.data.normal_()  # nothing to go on from
        errors.append(convsplit.refit(layer, conv, x, starts=starts)[0].after)
    assert errors[1] < 0.8 * errors[0]


def test_running_out_of_memory_is_not_taken_for_a_missing_derivative(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError):
        measure_sensitivity(nn.Sequential(nn.Conv2d(3, 2, 1)), ["0"], [torch.zeros(1, 3, 8, 8)])


@pytest.mark.parametrize(("size", "joined"), [(1, 2), (5, 2), (16, 3)])
def test_small_batches_are_joined_and_tell_the_same(size, joined):
    conv, x = nn.Conv2d(8, 4, 3), torch.randn(48, 8, 5, 5)

    def taken(parts):
        values = [(part, conv(part), (conv(part), part[:, :4, 1:-1, 1:-1])) for part in parts]
        return take_samples(conv, Stop("", len(values), lambda: iter(values)), 1).joined()

    samples, whole = taken(x.split(size)), taken([x])
    assert len(samples.batches) == joined
    found, wanted = (Moments.of(each).towards(each, each.targets()) for each in (samples, whole))
    assert found.count == wanted.count
    for name in ("patches", "cross", "patch_mean", "target_mean"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    kernel, bias = torch.randn(1, 4, 8, 9, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert samples.error(kernel, bias) == pytest.approx(whole.error(kernel, bias), rel=1e-5)


@pytest.mark.parametrize("seed", [0, 2])
def test_images_of_one_colour_leave_the_layers_as_they_are(seed: int) -> None:
    """Behind the first layer their features are equal but for rounding, which is nothing to fit a kernel to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    converted = convsplit.convert(model, seed=seed)
    before = copy.deepcopy(converted.state_dict())
    with pytest.warns(convsplit.ConversionWarning, match="no variance"):
        convsplit.refit(converted, model, torch.full((16, 8, 12, 12), 0.5), seed=seed)
    assert all(torch.equal(value, before[key]) for key, value in converted.state_dict().items())
