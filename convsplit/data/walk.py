"""Walking two models side by side: what reaches each split layer in one, what the other answers.

Repair is sequential: every layer is fitted on the features of a model whose earlier layers are already repaired. One
pass is enough for that, whatever the models do in Python: the forward pass of each batch is a thread that stops before
a layer, so all batches come to stand at the same layer, which is repaired before they go on.

Of layers called several times in a pass all calls are wanted before it is repaired. They are had from passes run for
that alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convsplit.data.baton import Abandoned, Pass, threads_of_each
from convsplit.data.following import see_what_follows
from convsplit.data.recipe import Place, Recipe
from convsplit.data.tail import NO_TAIL, Tail
from convsplit.model.running import Batch, Forward, call, run_or_explain, tensors_in

Value = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class Stop:
    """One layer on the walk, with so many `calls` in all batches that have come to it.

    `values` may be read again until the walk goes on. Each is the layer's input in the converted model, its answer in
    the original, and what the `tail` adds to that in the original and in the converted model (or None).
    """

    name: str
    calls: int
    values: Callable[[], Iterator[Value]]
    tail: Tail = NO_TAIL


def walk(
    original: nn.Module,
    converted: nn.Module,
    names: Iterable[str],
    others: Iterable[str],
    batches: Sequence[Batch],
    forward: Forward | None,
    memory_limit: float,
    *,
    tails: bool = True,
    every_call: bool = True,
) -> Generator[Stop, None, None]:
    """Stop at each of the named layers, in the order of execution; layers that the batches never reach are left out.

    Stops at `others` too, as far as they are called once, when there is something to make good. Without `tails`, what
    follows the layers is not looked at; without `every_call`, the first call of a layer stands for all.
    Both models must be in eval mode, and stay so. The caller may change a layer of `converted` at its stop, and should
    close the walk: the passes under way end then, where they stand.

    The values that passes under way hold take up `memory_limit` at most, or as much as the pass of one batch does:
    where there is no room for all batches, some wait and join in later, where maps are smaller.

    Raises:
        ValueError: one of the models does not run on a batch; names the module that failed and what reached it.
    """
    split = list(names)
    following = see_what_follows(original, {*split, *others}, batches[0], forward)
    calls = following.calls if every_call else {}
    once = {name for name in others if calls.get(name, 1) == 1}
    found = _tails_in(converted, following.tails) if tails else {}
    order = {name: index for index, name in enumerate(following.calls)}
    walker = _Walker(original, converted, batches, forward, set(split), once, following.alive, memory_limit)
    with walker.watching({each.place for tail in found.values() for each in tail.needs() if each.place}):
        while walker.due:
            name = walker.next_stop(order)
            if name is None:
                return
            if calls.get(name, 1) == 1:
                yield walker.stop_at(name, found.get(name, NO_TAIL))
            else:
                reached = [pair.batch for pair in walker.standing(name)]
                values = partial(_replayed, original, converted, name, calls[name], reached, forward)
                yield Stop(name, len(reached) * calls[name], values)
            walker.go_on(name)


def _tails_in(converted: nn.Module, tails: Mapping[str, Tail]) -> dict[str, Tail]:
    """The tails, without shortcuts (and what comes behind them) that go through a layer which is split, and ahead."""
    known = {"", *_state(converted)}
    return {
        name: tail if all(each.parameter in known for each in tail.needs()) else tail.alone()
        for name, tail in tails.items()
    }


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


class _Run(Pass):
    """One model on one batch."""

    def __init__(self, model: nn.Module, batch: Batch, forward: Forward | None, threads: int | None) -> None:
        super().__init__(lambda: (forward or call)(model, batch), threads)
        self.model, self.batch = model, batch
        self.shape: torch.Size | None = None  # of the input of the layer that it stands at
        self.value: Tensor | None = None  # that input or, in the original, the layer's answer
        self.seen: dict[Place, weakref.ref[Tensor]] = {}  # alive as long as the model itself still needs it

    def at_place(self, place: Place) -> Tensor | None:
        found = self.seen.get(place)
        return None if found is None else found()


@dataclass
class _Pair:
    """One batch on its way through both models."""

    before: _Run
    after: _Run
    batch: Batch
    size: int  # of the batch, in bytes
    held: float = 0.0  # bytes of features, about

    @property
    def comparable(self) -> bool:
        """Whether the original came to the layer too, with an input of the same shape."""
        return self.before.value is not None and self.before.shape == self.after.shape

    def shortcuts(self, recipe: Recipe, states: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """What will be added to the layer's answer in the two models."""
        runs = (self.before, self.after)
        own, other = (recipe.value(run.at_place, state) for run, state in zip(runs, states, strict=True))
        assert self.before.value is not None
        if own is None or other is None or not own.shape == other.shape == self.before.value.shape:
            return None
        return own, other

    def close(self) -> None:
        self.held, self.before.value, self.after.value = 0.0, None, None
        self.before.abandon()
        self.after.abandon()


class _Walker:
    """All batches on their way, the split layers ahead (`waiting`) and the others that may be stopped at."""

    def __init__(
        self, original: nn.Module, converted: nn.Module, batches: Sequence[Batch], forward: Forward | None,
        waiting: set[str], others: set[str], alive: Mapping[str, int], memory_limit: float,
    ) -> None:  # fmt: skip
        self.models, self.forward = (original, converted), forward
        self.waiting, self.others, self.drifted = waiting, others, False
        self.alive, self.memory_limit = alive, memory_limit
        self.running: _Run | None = None
        threads = threads_of_each(2 * len(batches))
        self.pairs = []
        for batch in batches:
            before, after = (_Run(model, batch, forward, threads) for model in self.models)
            self.pairs.append(
                _Pair(before, after, batch, sum(t.numel() * t.element_size() for t in tensors_in(batch)))
            )

    @property
    def due(self) -> set[str]:
        """The layers that are stopped at."""
        return self.waiting | self.others if self.drifted else self.waiting

    def standing(self, name: str) -> list[_Pair]:
        """The batches that have come to a layer."""
        return [pair for pair in self.pairs if pair.after.at == name]

    def next_stop(self, order: Mapping[str, int]) -> str | None:
        """The first layer that batches stand at when all have gone as far as there is room.

        A layer that is not in `order` is on a branch, which leads back to where others stand.
        """
        for pair in self.pairs:
            crowded = sum(each.held for each in self.pairs) > self.memory_limit
            if pair.after.at is None and not (crowded and self._reached_names()):
                self._advance(pair)
        return min(self._reached_names(), key=lambda name: order.get(name, -1), default=None)

    def _reached_names(self) -> set[str]:
        return {pair.after.at for pair in self.pairs if pair.after.at is not None}

    def _advance(self, pair: _Pair) -> None:
        """Have a batch come to the next layer in the converted model, then to the same in the original."""
        name = self._run(pair.after)
        pair.before.value = None
        while name is not None and self._run(pair.before) not in (name, None):
            pass
        if name is None:
            pair.close()
        else:
            pair.held = 2 * self.alive.get(name, 0) * pair.size / max(1, self.pairs[0].size)

    def _run(self, run: _Run) -> str | None:
        self.running, run.value = run, None
        try:
            at: str | None = run.advance()
        except Exception as error:  # from the model: say where
            run_or_explain(run.model, run.batch, self.forward)
            raise ValueError(f"{type(run.model).__name__} does not run on one of the batches") from error
        finally:
            self.running = None
        return at

    def stop_at(self, name: str, tail: Tail) -> Stop:
        """What has come to a layer. A shortcut that is not there in every batch is left out of the tail."""
        pairs = [pair for pair in self.standing(name) if pair.comparable]
        shortcuts: list[tuple[Tensor, Tensor] | None] = [None] * len(pairs)
        if tail.shortcut is not None:
            states = [_state(model) for model in self.models]
            shortcuts = [pair.shortcuts(tail.shortcut, states) for pair in pairs]
            if None in shortcuts:
                tail, shortcuts = tail.alone(), [None] * len(pairs)

        def values() -> Iterator[Value]:
            for pair, added in zip(pairs, shortcuts, strict=True):
                assert pair.after.value is not None
                assert pair.before.value is not None
                yield pair.after.value, pair.before.value, added

        return Stop(name, len(pairs), values, tail)

    def go_on(self, name: str) -> None:
        """A layer is done with: it is stopped at no more, and the batches that stand there are free to go on."""
        self.drifted = self.drifted or name in self.waiting
        self.waiting.discard(name)
        self.others.discard(name)
        for pair in self.standing(name):
            pair.after.at = pair.after.value = pair.before.value = None

    @contextmanager
    def watching(self, places: set[Place]) -> Iterator[None]:
        """Hooks in both models while inside; passes that are under way at the end are ended."""
        handles, threads = [], torch.get_num_threads()
        before, after = (dict(model.named_modules()) for model in self.models)
        try:
            for name in self.waiting | self.others:
                handles.append(before[name].register_forward_hook(partial(self._answered, name), with_kwargs=True))
                handles.append(after[name].register_forward_pre_hook(partial(self._reached, name), with_kwargs=True))
            for place in places:
                for module in (before[place.module], after[place.module]):
                    if place.given:
                        handles.append(module.register_forward_hook(partial(self._seen_given, place)))
                    else:
                        hook = partial(self._seen_taken, place)
                        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            yield
        finally:
            for pair in self.pairs:
                pair.close()
            for handle in handles:
                handle.remove()
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)

    def _here(self) -> _Run | None:
        """The run whose hook this is; None where somebody else runs the model."""
        return self.running if self.running is not None and self.running.runs_here() else None

    def _reached(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._here()
        if run is not None and name in self.due:
            run.value = first_of(args, kwargs)
            run.shape = run.value.shape
            run.stop(name)

    def _answered(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        run = self._here()
        if run is not None and name in self.due:
            run.value, run.shape = output, first_of(args, kwargs).shape
            run.stop(name)

    def _seen_given(self, place: Place, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self._here()
        if run is not None and isinstance(output, Tensor):
            run.seen[place] = weakref.ref(output)

    def _seen_taken(self, place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._here()
        if run is not None:
            run.seen[place] = weakref.ref(first_of(args, kwargs))


def first_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call, by position or by name."""
    return next(iter((*args, *kwargs.values())))


def _replayed(
    original: nn.Module,
    converted: nn.Module,
    name: str,
    count: int,
    batches: Sequence[Batch],
    forward: Forward | None,
) -> Iterator[Value]:
    """All calls of a layer in passes of their own, which go no further."""
    for batch in batches:
        inputs = _run_until(
            converted, name, count, batch, forward, lambda given, output: (given.shape, given.clone())
        )
        answers = _run_until(
            original, name, count, batch, forward, lambda given, output: (given.shape, output.clone())
        )
        for (shape, given), (original_shape, answer) in zip(inputs, answers, strict=False):
            if shape == original_shape:
                yield given, answer, None


def _run_until(
    model: nn.Module,
    name: str,
    count: int,
    batch: Batch,
    forward: Forward | None,
    take: Callable[[Tensor, Tensor], tuple[torch.Size, Tensor]],
) -> list[tuple[torch.Size, Tensor]]:
    """Run the model until a layer was called `count` times; copies (later steps may be in place) of what to take."""
    taken: list[tuple[torch.Size, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        taken.append(take(first_of(args, kwargs), output))
        if len(taken) == count:
            raise Abandoned

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        (forward or call)(model, batch)
    except Abandoned:
        pass
    finally:
        handle.remove()
    return taken
