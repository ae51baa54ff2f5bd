"""What follows each layer, seen while the model runs once: no graph is needed, and what was seen is what happens.

Every operation on tensors is noted under the innermost names that there are for its operands. That tells of a layer's
answer what batch norm, sum and ReLU come next and that nothing else reads it, and of a sum's other operand (a shortcut)
how to get at it in another run at the moment when the layer is reached: as what went into or came out of a module by
then, or computed ahead of its turn from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from convsplit.data.recipe import Name, Place, resolved
from convsplit.data.tail import Tail
from convsplit.model.hooks import Given, hooked
from convsplit.model.running import Batch, Forward, run_or_explain, tensors_in
from convsplit.spec import axes_of

aten = torch.ops.aten
_BATCH_NORMS = {  # and where the flag for training is among the arguments, if anywhere
    aten.native_batch_norm: 5, aten._native_batch_norm_legit: 5, aten._native_batch_norm_legit_no_training: None,
    aten.cudnn_batch_norm: 5, aten.miopen_batch_norm: 5,
}  # fmt: skip
_RECTIFIERS = (aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_, aten.clamp, aten.clamp_, aten.clamp_min)
_TRANSPARENT = (aten.clone, aten.alias, aten.detach)


@dataclass
class Chain:
    """A layer's answer and the steps it goes through while nothing else reads it."""

    reached: int  # when the layer was called
    axes: int  # of the layer
    steps: list[tuple[str, Any]] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Following:
    """What one run showed."""

    calls: dict[str, int]  # of each module, in the order of the first ones
    tails: dict[str, Tail]  # of the watched layers that were called once
    alive: dict[str, int]  # bytes of all that was computed and still held when a watched layer had answered


def see_what_follows(model: nn.Module, names: Iterable[str], batch: Batch, forward: Forward | None) -> Following:
    """Run a model in eval mode once and watch the named layers.

    Raises:
        ValueError: the model does not run on the batch; names the module that failed and what reached it.
    """
    watch = _Watch(model, set(names))
    with hooked(dict(model.named_modules()), before=watch.enter, after=watch.leave), watch:
        watch.finish(run_or_explain(model, batch, forward))
    tails = {name: _tail(chain, watch.again) for name, chain in watch.chains.items() if watch.calls[name] == 1}
    return Following(watch.calls, tails, watch.alive)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes note of every operation; holds no tensor longer than the model does."""

    def __init__(self, model: nn.Module, layers: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers, self.clock = {name: axes_of(model.get_submodule(name)) for name in layers}, 0
        self.calls: dict[str, int] = {}
        self.again: dict[str, int] = {}  # when a module was called for the second time
        self.alive: dict[str, int] = {}
        self.chains: dict[str, Chain] = {}
        self.known: Any = WeakTensorKeyDictionary()  # tensor: Name
        self.links: Any = WeakTensorKeyDictionary()  # tensor: [(chain, how many of its steps lead there)]
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            self.known[value] = Name(parameter=name)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it is never compiled, and marking it so would import the compiler, which takes seconds

    def enter(self, name: str, given: Given) -> None:
        self.clock += 1
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.calls[name] == 2:
            self.again[name] = self.clock
        first = next(iter((*given.args, *given.kwargs.values())), None)
        if isinstance(first, Tensor):
            self._seen(first, Place(name, given=False))

    def leave(self, name: str, given: Given, output: Any) -> None:
        self.clock += 1
        if not isinstance(output, Tensor):
            return
        self._seen(output, Place(name, given=True))
        if name in self.layers and name not in self.chains:
            self.chains[name] = chain = Chain(self.clock, self.layers[name])
            self.links.setdefault(output, []).append((chain, 0))
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._values()}
            self.alive[name] = sum(storages.values())

    def finish(self, outputs: Any) -> None:
        """What the model returns is read by somebody else."""
        for tensor in tensors_in(outputs):
            for chain, depth in self.links.get(tensor, ()):
                del chain.steps[depth:]

    def _values(self) -> list[Tensor]:
        return [tensor for tensor, name in self.known.items() if name.made]

    def _seen(self, tensor: Tensor, place: Place) -> None:
        name = self.known.setdefault(tensor, Name())
        if self.calls[place.module] == 1:
            name.places.append((place, self.clock, float("inf")))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.clock += 1
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        main = output[0] if isinstance(output, tuple | list) and output else output
        links = self._linked(func, args, operands)
        written = args[0] if func._schema.is_mutable and args and isinstance(args[0], Tensor) else None
        made = (func, tree_map(self._name, (args, kwargs or {})))
        if written is not None:
            self._rewritten(written, made)
            self.links[written] = links
        elif isinstance(main, Tensor) and not any(main is operand for operand in operands):
            self.known[main] = Name(made=made)
            if links:
                self.links[main] = links
        return output

    def _name(self, value: Any) -> Any:
        return self.known.setdefault(value, Name()) if isinstance(value, Tensor) else value

    def _rewritten(self, tensor: Tensor, made: Any) -> None:
        """Work in place: the places stay, what is there is another value."""
        old = self.known.setdefault(tensor, Name())
        self.known[tensor] = Name([(place, self.clock, end) for place, _, end in old.places], made)
        old.places = [(place, start, self.clock) for place, start, _ in old.places]

    def _linked(self, func: Any, args: tuple[Any, ...], operands: Sequence[Tensor]) -> list[tuple[Chain, int]]:
        """The chains that lead on to the result; others that the operands belong to end there."""
        led = []
        for operand in operands:
            for chain, depth in self.links.get(operand, ()):
                step = None
                if not chain.ended and depth == len(chain.steps) and sum(operand is t for t in operands) == 1:
                    step = self._step(func, args, operand, chain)
                if step is None:  # an unknown operation, or a second one that reads the same value
                    chain.ended = True
                    del chain.steps[depth:]
                else:
                    chain.steps.append(step)
                    led.append((chain, len(chain.steps)))
        return led

    def _step(self, func: Any, args: tuple[Any, ...], value: Tensor, chain: Chain) -> tuple[str, Any] | None:
        kind, done = func.overloadpacket, [each for each, _ in chain.steps]
        if "clamp" in done:
            return None
        if kind in _TRANSPARENT:
            return "same", None
        if kind in _RECTIFIERS and (ceiling := _ceiling(kind, args)) is not None:
            return "clamp", ceiling
        if func in (aten.add.Tensor, aten.add_.Tensor) and "add" not in done and len(args) == 2:
            other = args[1] if args[0] is value else args[0]
            return ("add", self._name(other)) if isinstance(other, Tensor) and other.shape == value.shape else None
        # Of a linear layer's answer [N, T, O] batch norm normalises T.
        by_channel = value.dim() == chain.axes + 2
        if kind in _BATCH_NORMS and args[0] is value and by_channel and not {"affine", "add"} & set(done):
            training = _BATCH_NORMS[kind]
            return None if training is not None and args[training] else ("affine", _affine(args[1:5], args[-1]))
        return None


def _ceiling(kind: Any, args: tuple[Any, ...]) -> float | None:
    """The upper end of a clamping from zero on; None for other ones."""
    if kind in (aten.relu, aten.relu_):
        return float("inf")
    low, high = (*args[1:3], None, None)[:2]
    if kind in (aten.hardtanh, aten.hardtanh_):
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    return None if low != 0 else float("inf") if high is None else float(high)


def _affine(statistics: Sequence[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift [O] of a batch norm in eval mode."""
    weight, bias, mean, var = statistics
    assert mean is not None
    assert var is not None
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    return scale.detach(), ((0 if bias is None else bias) - scale * mean).detach()


def _tail(chain: Chain, again: Mapping[str, int]) -> Tail:
    found = dict(chain.steps)
    scale, shift = found.get("affine", (None, None))
    shortcut = None if "add" not in found else resolved(found["add"], chain.reached, again)
    if "add" in found and shortcut is None:  # what is added cannot be known in time, so neither what comes behind it
        return Tail(scale, shift)
    return Tail(scale, shift, shortcut, found.get("clamp"))
