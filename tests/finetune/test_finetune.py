"""Fine-tuning: it helps, it stops and resumes cleanly, and leaves alone what it should."""

import copy
import importlib
import itertools
import math

import pytest
import torch
from residual import SmallNet, Untraceable, images, small_net
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import convsplit
from convsplit import Budget, SeparableConv2d
from convsplit.finetune.blocks import find_modules, find_spans, walk_blocks
from convsplit.finetune.reconstruction import schedule
from convsplit.model.graphs import SplitTracer
from convsplit.repair import recalibrate


def converted_net(cls=SmallNet, fraction=0.2):
    model = small_net(cls)
    return model, convsplit.convert(model, budget=Budget(params=fraction))


def drift(model, converted, inputs):
    return convsplit.compare(converted, model, inputs).drift.relative


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def spans_of(model: nn.Module) -> list[list[str]]:
    graph = SplitTracer().trace(model)
    nodes = list(graph.nodes)
    split = {name for name, m in model.named_modules() if isinstance(m, SeparableConv2d)}
    spans = find_spans(nodes, torch.fx.GraphModule(model, graph), split)
    return [[str(n.target) for n in nodes[a + 1 : b + 1] if n.op == "call_module"] for a, b in spans]


class UNet(nn.Module):
    """Long skip connections: nothing but the input passes alone."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(nn.Conv2d(c, 16, 3, padding=1), nn.ReLU()) for c in (3, 16)])
        self.up = nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(19, 4, 3, padding=1)

    def forward(self, x):
        a = self.down[0](x)
        b = self.down[1](F.max_pool2d(a, 2))
        return self.last(torch.cat([self.up(torch.cat([a, F.interpolate(b, scale_factor=2)], 1)), x], 1))


# ------------------------------------------------------------------------------------------------ blocks


def test_spans_are_residual_blocks_and_convolutions_with_their_activations():
    _, converted = converted_net(fraction=0.4)
    found = spans_of(converted)
    assert ["blocks.0.conv1", "blocks.0.bn1", "blocks.0.conv2", "blocks.0.bn2"] in found
    assert all(block[-1] != "blocks.0.conv1" for block in found)


def test_modules_are_found_where_no_single_tensor_passes():
    model = UNet()
    converted = convsplit.convert(model, rank=1, forms="dw-pw")
    split = {name for name, m in converted.named_modules() if isinstance(m, SeparableConv2d)}
    assert list(find_modules(converted, split, [images(2)], None)) == ["down.0", "down.1", "up", "last"]


@pytest.mark.parametrize("cls", [SmallNet, Untraceable, UNet], ids=lambda c: c.__name__)
def test_blocks_compute_what_the_model_computes(cls):
    model = small_net(cls) if issubclass(cls, SmallNet) else cls().eval()
    converted = convsplit.convert(model, exact=True)
    with torch.no_grad():
        count, blocks = walk_blocks(model, converted.eval(), [images(4), images(3, seed=1)], None)
        names = []
        for block in blocks:
            names.append(block.name)
            for x, target in zip(block.inputs, block.targets, strict=True):
                torch.testing.assert_close(block.run(x), target, rtol=1e-3, atol=1e-4)
    assert len(set(names)) == len(names) == count > 1


# ------------------------------------------------------------------------------------------------ reconstruction


@pytest.mark.parametrize("cls", [SmallNet, Untraceable], ids=lambda c: c.__name__)
def test_reconstruction_lowers_the_drift_and_no_block_gets_worse(cls):
    model, converted = converted_net(cls)
    before, frozen = drift(model, converted, images(64, seed=1)), copy.deepcopy(model.state_dict())
    untouched = {k: v.clone() for k, v in converted.state_dict().items() if "bn" in k or "head" in k}
    state = torch.get_rng_state()
    blocks = convsplit.reconstruct(converted, model, list(images(128).split(32)), steps=40, lr=5e-3)
    assert drift(model, converted, images(64, seed=1)) < 0.8 * before
    assert all(block.after <= block.before for block in blocks)
    assert same(frozen, model.state_dict())
    assert all(torch.equal(converted.state_dict()[k], v) for k, v in untouched.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.grad is None for p in converted.parameters())


def test_an_interrupted_block_is_put_back():
    model, converted = converted_net()
    before, calls = copy.deepcopy(converted.state_dict()), itertools.count()

    def interrupt(*_):
        if next(calls) == 20:
            raise KeyboardInterrupt

    handle = converted.stem.depthwise.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        convsplit.reconstruct(converted, model, images(64), steps=100)
    handle.remove()
    assert same(before, converted.state_dict())
    assert all(p.requires_grad for p in converted.parameters())


def test_schedule_warms_up_and_ends_at_zero():
    values = [schedule(step / 1000) for step in range(1001)]
    assert 0 < values[0] < 0.05
    assert max(values) == pytest.approx(1, abs=1e-3)
    assert values[-1] == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize(
    "options",
    [{}, {"train": "split"}, {"features": 1.0}, {"freeze_norms": False}]
    + [{"mixed_precision": precision, "features": 1.0} for precision in (True, False)],
    ids=str,
)
def test_distillation_lowers_the_loss(options):
    model, converted = converted_net()
    others = {k: v.clone() for k, v in converted.named_parameters() if "head" in k or "bn" in k}
    frozen = copy.deepcopy(model.state_dict())
    course = convsplit.distill(converted, model, images(256), epochs=6, lr=3e-3, **options)
    assert course.best.loss < 0.8 * course.before.loss
    assert same(frozen, model.state_dict())
    assert not model.training
    assert not converted.training
    assert all(p.requires_grad and p.grad is None for p in (*converted.parameters(), *model.parameters()))
    moved = any(not torch.equal(v, dict(converted.named_parameters())[k]) for k, v in others.items())
    assert moved == (options.get("train") != "split")
    statistics_moved = not torch.equal(model.blocks[0].bn1.running_mean, converted.blocks[0].bn1.running_mean)
    assert statistics_moved == (not options.get("freeze_norms", True))


class Scattering(nn.Module):
    """Adds rows of its features to a float32 tensor, which takes no others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv(x).mean((2, 3))
        return torch.zeros(features.shape).index_add_(0, torch.arange(len(features)), features)


def test_models_that_mix_dtypes_by_hand_train_in_float32(monkeypatch):
    distillation = importlib.import_module("convsplit.finetune.distillation")
    monkeypatch.setattr(distillation, "has_bfloat16", lambda device: True)
    model = Scattering().eval()
    converted = convsplit.convert(model, images(), rank=1)
    assert not convsplit.distill(copy.deepcopy(converted), model, images(128), epochs=2).mixed_precision
    with pytest.raises(RuntimeError, match="same scalar type"):
        convsplit.distill(converted, model, images(128), epochs=2, mixed_precision=True)
    model, converted = converted_net()
    assert convsplit.distill(converted, model, images(128), epochs=2).mixed_precision


def test_the_learning_rate_follows_the_drift_unless_given():
    model, converted = converted_net()
    course = convsplit.distill(copy.deepcopy(converted), model, images(128), epochs=1)
    assert course.lr == pytest.approx(min(2e-3 * course.before.drift**2, 1e-3))
    assert convsplit.distill(converted, model, images(128), epochs=1, lr=1e-5).lr == 1e-5


def test_the_same_seed_gives_the_same_and_the_best_weights_are_kept():
    model, converted = converted_net()
    twins = [copy.deepcopy(converted) for _ in range(3)]
    courses = [
        convsplit.distill(twin, model, images(128), epochs=3, lr=3e-3, seed=seed)
        for twin, seed in zip(twins, (0, 0, 1), strict=True)
    ]
    assert same(twins[0].state_dict(), twins[1].state_dict())
    assert not same(twins[0].state_dict(), twins[2].state_dict())
    held_out = images(128).split(64)[-1]
    assert drift(model, twins[0], held_out) == pytest.approx(courses[0].best.drift, rel=1e-3)


def test_an_interrupted_run_keeps_the_best_and_resumes(tmp_path):
    model, converted = converted_net()
    whole, halves = copy.deepcopy(converted), copy.deepcopy(converted)
    convsplit.distill(whole, model, images(256), epochs=4, lr=3e-3, features=1.0)
    calls = itertools.count()

    def interrupt(batch):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return batch

    path = tmp_path / "distill.pt"
    arguments = {"epochs": 4, "lr": 3e-3, "features": 1.0, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        convsplit.distill(halves, model, images(256), augment=interrupt, **arguments)
    assert not same(converted.state_dict(), halves.state_dict())
    fresh = copy.deepcopy(converted)
    course = convsplit.distill(fresh, model, images(256), **arguments)
    assert course.checks[-1].step == 12
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key])
    path.write_bytes(b"nonsense")
    with pytest.raises(Exception, match="."):
        convsplit.distill(fresh, model, images(256), **arguments)


def test_outputs_of_any_nesting_labels_and_loaders():
    class Nested(SmallNet):
        def forward(self, x):
            y = super().forward(x)
            return {"logits": y, "parts": (y[:, :1], x.argmax(1))}

    model = small_net(Nested)
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    data = torch.utils.data.TensorDataset(images(128), torch.arange(128) % 5)
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
    course = convsplit.distill(
        converted, model, loader, epochs=3,
        forward=lambda m, batch: m(batch[0]),
        criterion=lambda output, batch: 0.1 * F.cross_entropy(output["logits"], batch[1]),
    )  # fmt: skip
    assert course.checks[-1].step == 12
    assert all(math.isfinite(check.loss) for check in course.checks)


def test_time_and_patience_end_the_training():
    model, converted = converted_net()
    course = convsplit.distill(copy.deepcopy(converted), model, images(256), epochs=100_000, seconds=0.5)
    assert course.checks[-1].step < 100_000
    course = convsplit.distill(converted, model, images(256), epochs=100, lr=0.0, patience=1)
    assert len(course.checks) == 2


def test_nonsense_is_refused():
    model, converted = converted_net()
    for arguments, message in (
        ({"train": "some"}, 'want "all" or "split"'),
        ({"held_out": 2}, "want a share"),
        ({"lr": 1e30, "epochs": 3}, "lower lr="),
    ):
        with pytest.raises(ValueError, match=message):
            convsplit.distill(converted, model, images(128), **arguments)
    with pytest.raises(ValueError, match="want at least 2"):
        convsplit.distill(converted, model, [images(4)])
    with pytest.raises(ValueError, match="does not run"):
        convsplit.distill(converted, model, torch.zeros(128, 1, 12, 12))
    with pytest.raises(ValueError, match="want at least 1"):
        convsplit.reconstruct(converted, model, images(8), steps=0)
    assert all(p.isfinite().all() for p in converted.parameters())


# ------------------------------------------------------------------------------------------------ loops of one's own


def test_groups_hold_every_trainable_parameter_once():
    _, converted = converted_net(fraction=0.5)
    converted.head.bias.requires_grad_(False)
    groups = convsplit.finetune.parameter_groups(converted, lr=0.1, weight_decay=0.01, split_lr=0.05)
    held = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in converted.parameters() if p.requires_grad}
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "factors": (0.05, 0.0),
        "weights": (0.1, 0.01),
        "undecayed": (0.1, 0.0),
    }
    optimizer = torch.optim.AdamW(groups)
    convsplit.finetune.check_optimizer(optimizer, converted)
    converted.requires_grad_(False)
    with pytest.raises(ValueError, match="requires_grad_"):
        convsplit.finetune.parameter_groups(converted)


def test_the_penalty_pulls_at_the_merged_kernel():
    conv = nn.Conv2d(8, 8, 3, bias=False)
    layer = SeparableConv2d.from_conv(conv, form="dw-pw", rank=8)
    convsplit.finetune.kernel_penalty(layer).backward()
    assert all(p.grad is not None for p in layer.parameters())
    torch.testing.assert_close(convsplit.finetune.kernel_penalty(layer), conv.weight.square().sum())


def test_an_optimizer_of_the_original_is_recognised():
    model, converted = converted_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"before conversion\?.*torch.optim.SGD\(convsplit.finetune.parameter_groups"
    ):
        convsplit.finetune.check_optimizer(optimizer, converted)
    convsplit.finetune.check_optimizer(torch.optim.SGD(converted.parameters(), lr=0.1), converted)


@pytest.mark.parametrize("late", [False, True])
def test_blocks_of_models_with_several_inputs(late):
    """A second input that nobody reads is no part of a block; one that is read late leaves no block before it."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x, scale=None):
            y = torch.relu(self.first(x))
            return self.second(y * scale if late else y)

    torch.manual_seed(0)
    model = Scaled().eval()
    converted = convsplit.convert(model, budget=Budget(params=0.3))
    data = [{"x": images(16, seed=seed), "scale": torch.rand(16, 1, 1, 1)} for seed in range(2)]
    blocks = convsplit.reconstruct(converted, model, data, steps=10)
    assert [block.name for block in blocks] == ["first", "second"]
    assert all(block.after < block.before for block in blocks)


# ---------------------------------------------------------------------------------------- awkward models and data


class Auxiliary(nn.Module):
    """Answers more in train mode, as heads of segmentation models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        y = F.dropout(self.a(x).relu(), 0.1, self.training)
        return (self.b(y), self.aux(y)) if self.training else self.b(y)


class WantsTargets(Auxiliary):
    def forward(self, x, targets=None):
        assert not self.training or targets is not None, "targets should not be none when in training mode"
        return self.b(self.a(x).relu())


class UnderAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.b(self.a(x).relu())


class Masked(UnderAutocast):
    def forward(self, x, mask):
        y = self.b(self.a(x).relu()).flatten(2)
        return (y.mT @ y / 32 + mask).softmax(-1) @ y.mT


def split_of(cls) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = cls().eval()
    return model, convsplit.convert(model, rank=1, forms="dw-pw")


@pytest.mark.parametrize("cls", [Auxiliary, WantsTargets])
def test_models_that_answer_otherwise_in_train_mode_are_distilled(cls):
    model, converted = split_of(cls)
    before = drift(model, converted, images(32))
    convsplit.distill(converted, model, images(256), epochs=2)
    assert drift(model, converted, images(32)) < before
    assert not any(module.training for module in (*model.modules(), *converted.modules()))


def test_dropout_stays_on_in_distillation_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Conv2d(8, 8, 3)).eval()
    converted, seen = convsplit.convert(model, rank=1, forms="dw-pw"), []

    def note(module, args, output):
        seen.append((type(module).__name__, module.training))

    for module in converted.modules():
        module.register_forward_hook(note)
    convsplit.distill(converted, model, images(128), epochs=1)
    assert {name for name, training in seen if training} == {"Dropout"}


def test_blocks_run_under_the_autocast_of_the_model():
    model, converted = split_of(UnderAutocast)
    before = drift(model, converted, images(32))
    assert convsplit.reconstruct(converted, model, images(64), steps=40)
    assert drift(model, converted, images(32)) < before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_reconstructed_in_float32(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval().to(dtype)
    converted = convsplit.convert(model, rank=1, forms="dw-pw")
    places = [p.data_ptr() for p in converted.parameters()]
    blocks = convsplit.reconstruct(converted, model, images(64).to(dtype), steps=40)
    assert all(block.after < block.before for block in blocks)
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert [p.data_ptr() for p in converted.parameters()] == places


def test_masks_may_be_infinite():
    model, converted = split_of(Masked)
    given = [(images(16, seed=seed), torch.full((64, 64), -math.inf).triu(1)) for seed in range(3)]
    before = drift(model, converted, given)
    convsplit.refit(converted, model, given)
    convsplit.distill(converted, model, given, epochs=2)
    assert drift(model, converted, given) < before
    with pytest.raises(ValueError, match="batch 1 holds NaN"):
        convsplit.refit(converted, model, [given[0], (given[0][0] * math.nan, given[0][1])])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(images(64))


def test_loaders_without_a_length_are_read_once_and_kept():
    model, converted = split_of(Auxiliary)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=16)
    assert convsplit.compare(converted, model, loader).images == 64
    assert len(convsplit.refit(converted, model, loader)) == 2
    course = convsplit.distill(converted, model, loader, epochs=2)
    assert course.checks[-1].step == 2 * 3


@pytest.mark.parametrize("where", [0, 1, 2])
def test_empty_batches_are_left_out(where):
    model, converted = split_of(Auxiliary)
    batches = [images(16, seed=seed) for seed in range(3)]
    batches.insert(where, images(16)[:0])
    course = convsplit.distill(converted, model, batches, epochs=1)
    assert course.best.drift > 0
    assert math.isfinite(course.best.loss)
    assert course.checks[-1].step == 2


def test_a_loader_whose_batches_are_partly_empty_trains_to_its_end():
    class Loader:
        def __len__(self):
            return 4

        def __iter__(self):
            return iter([images(16)[:0], images(16), images(16)[:0], images(16, seed=1)])

    model, converted = split_of(Auxiliary)
    course = convsplit.distill(converted, model, Loader(), epochs=2)
    assert course.checks[-1].step == 8
    assert math.isfinite(course.best.loss)


@pytest.mark.parametrize("work", [convsplit.refit, convsplit.reconstruct, convsplit.distill])
def test_nothing_but_empty_batches_is_refused(work):
    model, converted = split_of(Auxiliary)
    with pytest.raises(ValueError, match="hold"):
        work(converted, model, [images(16)[:0]] * 3)


@pytest.mark.parametrize("work", [convsplit.refit, convsplit.reconstruct])
def test_random_models_are_left_as_they_are_and_it_is_said(work):
    class Noisy(Auxiliary):
        def forward(self, x):
            return self.b(F.dropout(self.a(x), 0.5, training=True))

    model, converted = split_of(Noisy)
    before = copy.deepcopy(converted.state_dict())
    with pytest.warns(convsplit.ConversionWarning, match="random numbers in eval mode"):
        assert work(converted, model, images(64)) == ()
    assert same(before, converted.state_dict())


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_images_that_carry_nothing_make_nothing_worse(value):
    model, converted = split_of(UnderAutocast)
    before = drift(model, converted, images(32))
    with pytest.warns(convsplit.ConversionWarning, match="no variance"):
        convsplit.refit(converted, model, torch.full((16, 3, 12, 12), value))
    assert drift(model, converted, images(32)) <= 1.01 * before


@pytest.mark.parametrize("reentrant", [True, False])
def test_models_with_gradient_checkpointing_are_calibrated(reentrant):
    class Checkpointed(Auxiliary):
        def forward(self, x):
            y = checkpoint(nn.Sequential(self.a, nn.ReLU()), x, use_reentrant=reentrant)
            return checkpoint(nn.Sequential(self.b, nn.ReLU()), y, use_reentrant=reentrant)

    class Plain(Auxiliary):
        def forward(self, x):
            assert x.isfinite().all()  # which no graph can follow either
            return self.b(self.a(x).relu()).relu()

    drifts = []
    for cls in (Plain, Checkpointed):
        model, converted = split_of(cls)
        convsplit.refit(converted, model, images(64))
        drifts.append(drift(model, converted, images(32)))
    assert drifts[1] < 1.05 * drifts[0]


@pytest.mark.parametrize("work", [convsplit.compare, recalibrate, convsplit.reconstruct, convsplit.distill])
def test_a_default_device_of_the_user_is_no_concern(work):
    model, converted = split_of(UnderAutocast)
    given = [converted, [images(16)] * 3] if work is recalibrate else [converted, model, [images(16)] * 3]
    options = {convsplit.reconstruct: {"steps": 2}, convsplit.distill: {"epochs": 1}}.get(work, {})
    torch.set_default_device("meta")  # on which every number that is made without a device is lost
    try:
        work(*given, **options)
    finally:
        torch.set_default_device(None)
    assert all(p.device.type == "cpu" for p in converted.parameters())
