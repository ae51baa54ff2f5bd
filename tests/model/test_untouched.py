"""What only looks at a model leaves it as it was, attributes, counters and weights included; what trains one in place
changes its weights and nothing else."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convsplit
from convsplit.model.copies import scratch_copy, working_copy
from convsplit.model.graphs import SplitTracer, trace

QUICK: dict[str, Any] = {"rank": 1, "forms": "dw-pw"}


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 4, 10, 10, generator=torch.Generator().manual_seed(1))


class Remembers(nn.Module):
    """Keeps what came out last, a list of sizes, and a counter in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last: Tensor | None = None
        self.sizes: list[int] = []
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        y = self.norm(self.b(self.a(x).relu()))
        same = self.last is not None and self.last.shape == y.shape
        self.last = (y + 0.1 * self.last if same else y).detach()
        return self.last if not y.requires_grad else y


class Merging(nn.Conv2d):
    """Adds a correction to its weight on eval(), and takes it off again on train(), as adapters do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.correction = nn.Parameter(0.1 * torch.randn_like(self.weight))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.correction if mode else self.correction
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight if self.merged else self.weight + self.correction, self.bias)


class ClipsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.data.clamp_(-0.05, 0.05)
        return self.b(self.a(x))


def merging() -> nn.Module:
    return nn.Sequential(Merging(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).train()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "state": lambda: Remembers().eval(), "merging": merging, "clipping": lambda: ClipsItsWeight().eval(),
}  # fmt: skip


def portrait(model: nn.Module) -> dict[str, Any]:
    """Every attribute, parameter and buffer of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules") and "hooks" not in key:
                found[f"{name}.{key}"] = copy.deepcopy(value)
    found.update((key, value.detach().clone()) for key, value in model.state_dict().items())
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return one.shape == other.shape and torch.equal(one, other)
        return bool(one == other) or (type(one) is type(other) and not isinstance(one, list | int | str | Tensor))

    return sorted(before.keys() ^ after.keys()) + [
        key for key in before.keys() & after.keys() if not equal(before[key], after[key])
    ]


def saved_and_loaded(model: nn.Module, split: nn.Module, folder: Path) -> nn.Module:
    convsplit.save(split, folder / "model.safetensors")
    return convsplit.load(folder / "model.safetensors", model)


LOOKS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "make_plan": lambda m, s, _: convsplit.make_plan(m, images()),
    "convert": lambda m, s, _: convsplit.convert(m, images(), **QUICK),
    "calibrate": lambda m, s, _: convsplit.make_plan(m, images(), calibration=[images()], **QUICK),
    "compare": lambda m, s, _: convsplit.compare(s, m, images()),
    "frontier": lambda m, s, _: convsplit.frontier(m, batches=images(), budgets=(0.5,), forms="dw-pw"),
    "by time": lambda m, s, _: convsplit.make_plan(
        m, images(), prefer="speed", stopwatch=convsplit.Stopwatch(seconds=0.2), **QUICK
    ),
    "merge": lambda m, s, _: convsplit.merge(s),
    "save": lambda m, s, folder: convsplit.save(s, folder / "model.safetensors"),
    "load": saved_and_loaded,
    "bench": lambda m, s, _: convsplit.bench(
        m, images(), budgets=(convsplit.Budget(macs=0.9),), batch_sizes=(1,), forms="dw-pw", seconds=0.2
    ),
    "for_inference": lambda m, s, _: convsplit.for_inference(s),
}
TRAINS: dict[str, Callable[[Any, Any], Any]] = {
    "refit": lambda m, s: convsplit.refit(s, m, [images(32)]),
    "reconstruct": lambda m, s: convsplit.reconstruct(s, m, [images(32)], steps=2),
    "distill": lambda m, s: convsplit.distill(s, m, [images()] * 3, epochs=1),
    "recalibrate": lambda m, s: convsplit.repair.recalibrate(s, [images(32)]),
}


@pytest.mark.filterwarnings("ignore::convsplit.ConversionWarning")
@pytest.mark.parametrize("what", LOOKS)
@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_neither_model(kind: str, what: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = KINDS[kind]()
    split = convsplit.convert(model, **QUICK)
    before = portrait(model), portrait(split)
    LOOKS[what](model, split, tmp_path)
    assert differences(before[0], portrait(model)) == []
    assert differences(before[1], portrait(split)) == []


@pytest.mark.filterwarnings("ignore::convsplit.ConversionWarning")
@pytest.mark.parametrize("what", TRAINS)
@pytest.mark.parametrize("training", [False, True])
def test_training_in_place_changes_weights_alone(what: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Remembers().train(training)
    split = convsplit.convert(model, **QUICK)
    before = portrait(model), portrait(split)
    TRAINS[what](model, split)
    assert differences(before[0], portrait(model)) == []
    moved = differences(before[1], portrait(split))
    assert moved, "nothing was learnt"
    assert all(key.endswith(("weight", "bias", "running_mean", "running_var", ".spec")) for key in moved), moved
    assert any(isinstance(m, convsplit.SeparableConv2d) and m.bias is not None for m in split.modules())


def test_training_refuses_models_whose_eval_merges() -> None:
    model = merging()
    split = convsplit.convert(model, **QUICK)
    before = portrait(split)
    with pytest.raises(ValueError, match="writes to its weights"):
        convsplit.refit(split, model, images())
    assert differences(before, portrait(split)) == []


def test_a_bias_that_is_learnt_reaches_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False)).eval()
    split = convsplit.convert(model, **QUICK)
    assert len(convsplit.refit(split, model, images(32))) == 2
    assert all(layer.bias is not None and layer.spec.bias for layer in (split[0], split[2]))
    assert torch.isfinite(split(images())).all()


def test_drift_of_a_model_with_a_state_is_repeatable() -> None:
    model = Remembers().eval()
    with torch.no_grad():
        model(images())
    split = convsplit.convert(model, **QUICK)
    drifts = {convsplit.compare(split, model, [images(), images()]).drift for _ in range(3)}
    assert len(drifts) == 1


# ------------------------------------------------------------------------------------------------ copies


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


def by_reference(forward: Callable[..., Any], owner: Any, *args: Any) -> Any:
    return forward(owner(), *args)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "decorator": lambda m: logged(m.forward),
    "two decorators": lambda m: logged(logged(m.forward)),
    "partial": lambda m: functools.partial(by_reference, type(m).forward, weakref.ref(m)),
    "compiled": lambda m: torch.compile(m.forward, backend="eager"),
    "method": lambda m: m.forward,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("copied", [scratch_copy, convsplit.convert], ids=lambda f: f.__name__)
def test_a_forward_set_on_the_instance_runs_the_copy(wrapper: str, copied: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    model.forward = WRAPPERS[wrapper](model)
    new, reached = copied(model), []
    handle = new[2].register_forward_hook(lambda *_: reached.append(True))
    with torch.no_grad():
        new(images())
    handle.remove()
    assert reached
    assert model.forward is not new.forward


def test_compare_says_when_split_layers_are_not_what_runs() -> None:
    class Picks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x) if type(layer) is nn.Conv2d else x
            return x

    model = Picks(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)).eval()
    report = convsplit.compare(convsplit.convert(model, **QUICK, skip="0"), model, images())
    assert report.layers[0].unused
    assert report.verdict.level == "unknown"
    assert any("never calls" in note and "1" in note for note in report.notes)


def test_working_copies_share_weights_and_nothing_else() -> None:
    model = convsplit.convert(Remembers().eval(), **QUICK)
    with working_copy(model) as working:
        assert {id(p) for p in working.parameters()} == {id(p) for p in model.parameters()}
        assert working.calls is not model.calls
        assert working.norm.running_mean is model.norm.running_mean
        assert working is not model
        assert working.a is not model.a


# ------------------------------------------------------------------------------------------------ threads


def test_conversions_and_models_in_several_threads() -> None:
    """torch.fx exchanges `__call__` of all modules while it traces: neither conversions nor models may be hit."""
    served, failures, stop = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval(), [], threading.Event()
    wanted = served(images()).detach()

    def serve() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(served(images()), wanted):
                    failures.append("another output")

    def guarded(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except Exception as error:  # which a thread would only print
                failures.append(repr(error))

        return run

    def trace_often() -> None:
        for _ in range(15):
            assert "" in trace(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))).graphs

    def convert_once() -> None:
        convsplit.convert(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), images(), **QUICK)

    server = threading.Thread(target=guarded(serve))
    workers = [
        threading.Thread(target=guarded(work)) for work in (trace_often, trace_often, convert_once, convert_once)
    ]
    for thread in (server, *workers):
        thread.start()
    for worker in workers:
        worker.join()
    stop.set()
    server.join()
    assert failures == []


def test_a_module_that_another_thread_runs_during_a_trace_runs_as_it_is() -> None:
    other, found = nn.Conv2d(4, 4, 3), []
    wanted = other(images())

    class RunsAnother(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: found.append(other(images())))
            thread.start()
            thread.join()
            return x + 1

    SplitTracer().trace(RunsAnother())
    assert len(found) == 1
    assert torch.equal(found[0], wanted)
