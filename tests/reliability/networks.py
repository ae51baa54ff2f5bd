"""Random small networks, and what has to hold for each of them."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import public
import torch
from snapshot import snapshot
from torch import Tensor, nn

import convsplit

# Relative error of an output, in the Euclidean norm, that an exact rewriting may have.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 0.2}
DTYPES = tuple(TOLERANCES)
MODES = ("zeros", "reflect", "replicate", "circular")
OUTPUTS = ("tensor", "tuple", "dict", "logits")
INPUTS = ("tensor", "tuple", "dict")


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Branches(nn.Module):
    """Several bodies side by side, joined along the channels or added up."""

    def __init__(self, bodies: dict[str, nn.Module], join: str) -> None:
        super().__init__()
        self.bodies, self.join = nn.ModuleDict(bodies), join

    def forward(self, x: Tensor) -> Tensor:
        answers = [body(x) for body in self.bodies.values()]
        return torch.cat(answers, dim=1) if self.join == "cat" else sum(answers[1:], answers[0])


class Twice(nn.Module):
    """One module called twice, under two names, in code that fx cannot trace for some."""

    def __init__(self, body: nn.Module, traceable: bool) -> None:
        super().__init__()
        self.body, self.again, self.traceable = body, body, traceable

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and not bool(x.isfinite().all()):
            raise ValueError("want finite inputs")
        return self.again(self.body(x))


class InList(nn.Module):
    """Parts in a list of lists, with an attribute and a buffer that change at every call."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList([part]) for part in parts)
        self.calls, self.seen = 0, []
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(tuple(x.shape))
        self.count += 1
        for (part,) in self.parts:
            x = part(x)
        return x


class Cast(nn.Module):
    """A body of another dtype."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.dtype)).to(x.dtype)


class Network(nn.Module):
    """Images (one or two of them) through a body to an answer of some kind."""

    def __init__(self, body: nn.Module, channels: int, output: str) -> None:
        super().__init__()
        self.body, self.output = body, output
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        features = self.body(x if y is None else x + y)
        logits = self.head(features.mean((2, 3)))
        if self.output == "dict":
            return {"features": features, "logits": logits}
        return {"logits": logits, "tensor": features, "tuple": (features, [logits])}[self.output]


@dataclass
class Case:
    """A network, what to call it with, and the coarsest dtype in it."""

    model: nn.Module
    inputs: Any
    dtype: torch.dtype


def drawn(rng: random.Random) -> Case:
    """A network of up to some ten convolutions."""
    torch.manual_seed(rng.randrange(2**31))
    dtype = rng.choice((torch.float64, torch.float32, *DTYPES))
    channels, dtypes = rng.randint(1, 6), [dtype]
    parts, width = [], channels
    for _ in range(rng.randint(1, 4)):
        part, width = _part(rng, width, rng.randint(0, 2))
        if rng.random() < 0.15:
            dtypes.append(rng.choice(DTYPES))
            part = _Later(part, dtypes[-1])
        parts.append(part)
    parts.append(_convolution(rng, width, width, strided=False, square=True))
    body = InList(parts) if rng.random() < 0.3 else nn.Sequential(*parts)
    model = Network(body, width, rng.choice(OUTPUTS)).to(dtype)
    for name, part in list(body.named_modules()):
        if isinstance(part, _Later):
            parent = body.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Cast(part.body, part.dtype))
    _attached(rng, model)
    if rng.random() < 0.3:
        model.to(memory_format=torch.channels_last)
    size = rng.randint(9, 14)
    x = torch.randn(2, channels, size, size + rng.randint(0, 2)).to(dtype)
    kind = rng.choice(INPUTS)
    inputs: Any = {"tensor": x, "tuple": (x, x.flip(0)), "dict": {"x": x, "y": x.flip(0)}}[kind]
    return Case(model.eval(), inputs, max(dtypes, key=TOLERANCES.__getitem__))


class _Later(nn.Module):
    """Marks what will run in another dtype, once the network as a whole has its own."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body, dtype


def _part(rng: random.Random, width: int, depth: int) -> tuple[nn.Module, int]:
    """Some part that takes `width` channels, and how many come out."""
    kind = rng.choice(("plain", "residual", "branches", "twice", "nested")) if depth else "plain"
    if kind == "residual":
        return Residual(_same(rng, width, depth)), width
    if kind == "twice":
        return Twice(_same(rng, width, depth), rng.random() < 0.5), width
    if kind == "branches":
        bodies = {f"b{index}": _same(rng, width, depth - 1) for index in range(rng.randint(2, 3))}
        join = rng.choice(("cat", "add"))
        return Branches(bodies, join), width * (len(bodies) if join == "cat" else 1)
    if kind == "nested":
        first, middle = _part(rng, width, depth - 1)
        second, last = _part(rng, middle, depth - 1)
        return nn.Sequential(first, nn.Sequential(second)), last
    out = rng.randint(1, 8)
    return nn.Sequential(_convolution(rng, width, out, strided=rng.random() < 0.2), *_behind(rng, out)), out


def _same(rng: random.Random, width: int, depth: int) -> nn.Module:
    """A body that keeps channels and size."""
    parts = [_convolution(rng, width, width, strided=False), *_behind(rng, width)]
    return nn.Sequential(*parts, Residual(_same(rng, width, 0))) if depth > 1 else nn.Sequential(*parts)


def _convolution(rng: random.Random, inside: int, outside: int, *, strided: bool, square: bool = False) -> nn.Conv2d:
    """Any geometry that keeps the size, or halves it."""
    kernel = (3, 3) if square else (rng.choice((1, 3, 5)), rng.choice((1, 3)))
    dilation = 1 if strided or square else rng.randint(1, 2)
    padding: Any = tuple(dilation * (k - 1) // 2 for k in kernel)
    groups = rng.choice([g for g in range(1, inside + 1) if inside % g == 0 and outside % g == 0])
    if not strided and rng.random() < 0.2:
        padding = "same"
    return nn.Conv2d(
        inside, outside, kernel, 2 if strided else 1, padding, dilation, groups, rng.random() < 0.6,
        rng.choice(MODES) if min(kernel) > 1 else "zeros",
    )  # fmt: skip


def _behind(rng: random.Random, width: int) -> list[nn.Module]:
    norms: list[nn.Module] = [nn.BatchNorm2d(width), nn.GroupNorm(1, width), nn.Identity()]
    return [rng.choice(norms), rng.choice((nn.ReLU(inplace=True), nn.SiLU(), nn.Tanh()))]


def _attached(rng: random.Random, model: nn.Module) -> None:
    """What users hang on to models: frozen parameters, gradients, hooks, attributes, parts in train mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Conv2d) and rng.random() < 0.2:
            module.note = ["mine", {"rank": rng.random()}]
            module.register_forward_hook(_look)
    for parameter in model.parameters():
        parameter.requires_grad_(rng.random() < 0.8)
        if parameter.requires_grad and rng.random() < 0.2:
            parameter.grad = torch.ones_like(parameter)


def _look(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that changes nothing."""


def runs(case: Case) -> bool:
    """Whether torch takes it: small images do not always go with wide paddings."""
    try:
        public.run(copy.deepcopy(case.model), case.inputs)
    except (RuntimeError, ValueError):
        return False
    return True


def check(case: Case) -> int:
    """All that has to hold; the number of layers that were split."""
    expected = public.run(copy.deepcopy(case.model), case.inputs)
    before, state = snapshot(case.model), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convsplit.ConversionWarning)
        plan = public.exact_plan(case.model, case.inputs)
    assert convsplit.Plan.from_json(plan.to_json()) == plan
    converted = public.apply(case.model, plan)
    split = [m for m in converted.modules() if isinstance(m, convsplit.SeparableConv2d)]
    assert len(split) == len(plan.split)
    _check_close(public.run(copy.deepcopy(converted), case.inputs), expected, case.dtype)
    merged = convsplit.merge(converted)
    assert not any(isinstance(m, convsplit.SeparableConv2d) for m in merged.modules())
    _check_close(public.run(merged, case.inputs), expected, case.dtype)
    _check_storage(case, converted)
    assert snapshot(case.model) == before
    assert torch.equal(torch.get_rng_state(), state)
    return len(split)


def _check_storage(case: Case, converted: nn.Module) -> None:
    fresh = copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        convsplit.save(converted, path)
        assert [each.name for each in Path(folder).iterdir()] == [path.name]
        again = convsplit.load(path, fresh)
    stored, loaded = converted.state_dict(), again.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[key], loaded[key]) for key in stored)
    outputs = zip(public.run(again, case.inputs), public.run(copy.deepcopy(converted), case.inputs), strict=True)
    assert all(torch.equal(got, wanted) for got, wanted in outputs)


def _check_close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for y, z in zip(got, expected, strict=True):
        assert (y.dtype, y.shape) == (z.dtype, z.shape)
        error = (y.double() - z.double()).norm() / z.double().norm().clamp_min(1e-6)
        assert float(error) <= TOLERANCES[dtype], f"an exact rewriting is off by {float(error):.2g} in {dtype}"
