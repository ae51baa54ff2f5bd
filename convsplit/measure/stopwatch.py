"""Latency: what convolutions and their options cost in milliseconds, measured where they will run.

Fewer MACs are a promise, not a speed: a depthwise stage is bound by memory, kernels of one layout are slow in the
other, and a wide pointwise stage may cost more than the dense layer it replaces. So options are timed on the model's
device, in its dtype and memory layout, with the present number of threads, at the shapes that the layer sees.

Two kinds of measurement:

* `Stopwatch`: a layer and a coarse grid of its options, alone and in turns (dense, first option, second option, dense,
  ...), so that a machine that slows down slows them all. Between measured ranks milliseconds are interpolated. Runtimes
  that store images in blocks of channels are offered widths that fill their blocks, where there are such: others leave
  the fast kernels of the depthwise stage and can take several times as long.
* `time_models`: whole models in turns, and each of their layers within its model, with the caches as they are there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from convsplit.choose.options import Menu, Option
from convsplit.choose.plan import Conditions
from convsplit.kinds import Equivalent
from convsplit.layers.separable import ARRANGEMENTS, SeparableConv
from convsplit.measure.timing import milliseconds_in_turns
from convsplit.progress import track
from convsplit.runtimes import Runtime, runtime_of
from convsplit.runtimes.base import Prepare, Run
from convsplit.spec import ConvSpec, is_plain
from convsplit.structure import Structure

COARSE, COARSER = 5, 3  # ranks of a form that are measured, and of slow layers; the others are interpolated
HOPELESS = 1.5  # times as slow as the dense layer: one run is enough to see it
ROOM = 2**28  # numbers in feature maps that candidates which take turns may hold
LARGE = 2**20  # numbers in a feature map: smaller ones stay in the cache anyway, and are not tried image by image

Shape = tuple[int, ...]
M = TypeVar("M", bound=nn.Module)


@dataclass
class Stopwatch:
    """Measures the options of layers, equal layers only once, and remembers what it has measured.

    Args:
        seconds: about the longest that one `timed` may take. Of slow layers fewer ranks are measured, each at least
            twice; a candidate that is much slower than the dense layer is not run again.
        training: time forward and backward passes instead of inference.
        runtime: where: "torch", "torch.compile", "torch.amp", "torch.cuda_graph", "onnxruntime", "openvino", or a
            function `(model, batch) -> run`, called for layers (with one tensor) and for whole models; `run()` runs
            once and may return the milliseconds it measured, as a float.

    Raises:
        ValueError: an unknown runtime, or one that does not train for `training`.
        ImportError: a runtime that is not installed.
    """

    seconds: float = 30.0
    training: bool = False
    runtime: str | Runtime | Prepare = "torch"
    _known: dict[tuple[Any, ...], _Curves] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.runtime = runtime_of(self.runtime)
        if self.training and not self.runtime.trains:
            raise ValueError(f"runtime {self.runtime.name!r} does not train; training=True is for 'torch'")

    @property
    def where(self) -> Runtime:
        """The runtime as a value."""
        return runtime_of(self.runtime)

    def timed(self, menus: Sequence[Menu], conditions: Conditions, *, progress: bool | None = None) -> list[Menu]:
        """The same menus with the milliseconds of every option, and the arrangement in which it takes those.

        Sites that the example inputs never reached cost nothing.
        """
        menus = [_in_blocks(menu, self.where.block) for menu in menus]
        cases = {
            self._key(menu, shape, conditions): (menu, shape)
            for menu in menus
            for shape in dict.fromkeys(use.input_shape for use in menu.site.calls)
        }
        fresh = [key for key in cases if key not in self._known]
        for key in track(fresh, "Measuring layers", progress=progress):
            menu, shape = cases[key]
            original = menu.site.original
            assert original is not None
            self._known[key] = self._measured(original, menu.options, shape, conditions, self.seconds / len(fresh))
        return [self._filled(menu, conditions) for menu in menus]

    def _key(self, menu: Menu, shape: Shape, conditions: Conditions) -> tuple[Any, ...]:
        assert menu.site.spec is not None
        ranks: dict[tuple[str, bool], list[int]] = {}
        for structure in filter(None, (option.structure for option in menu.options)):
            ranks.setdefault((structure.form, structure.even), []).append(structure.components)
        # Between the smallest and the largest rank of each form milliseconds are interpolated, beyond they are not.
        spans = tuple((form, min(found), max(found)) for form, found in sorted(ranks.items()))
        return (replace(menu.site.spec, bias=False), shape, conditions, self.training, spans)

    def _filled(self, menu: Menu, conditions: Conditions) -> Menu:
        curves = [self._known[self._key(menu, use.input_shape, conditions)] for use in menu.site.calls]
        return replace(menu, options=tuple(_with_time(option, curves) for option in menu.options))

    def _measured(
        self, original: Equivalent, options: Sequence[Option], shape: Shape, conditions: Conditions, seconds: float
    ) -> _Curves:
        conv, runtime = original.conv, self.where
        shape = shape if len(shape) == conv.weight.dim() else (1, *shape)
        layout = torch.channels_last if conditions.layout == "channels_last" and len(shape) == 4 else None
        x = torch.randn(shape, device=conv.weight.device).to(conv.weight.dtype)
        x = x if layout is None else x.contiguous(memory_format=layout)
        dense = _dense(original)
        candidates: dict[_Candidate, nn.Module] = {_Candidate(None, "stages"): dense}
        run = _forward_and_backward if self.training else runtime.prepare_layer
        clock = runtime.clock(x.device)
        (once,) = milliseconds_in_turns([run(dense, x)], 0.0, clock=clock, least_rounds=1)
        for structure in _coarse(options, COARSE if once < 1e3 * seconds / 100 else COARSER):
            layer = with_noise(SeparableConv.empty_like(conv, **vars(structure), pad=original.pad))
            for arrangement, arranged in _arranged(layer, [shape], runtime.arrangements).items():
                candidates[_Candidate(structure, arrangement)] = arranged
        if layout is not None:
            candidates = {name: module.to(memory_format=layout) for name, module in candidates.items()}
        share = 1 if self.training else runtime.copies
        times = _taken(
            candidates, lambda module: run(module.train(self.training), x), seconds, clock=clock,
            at_once=max(1, ROOM // (4 * share * x.numel())),
        )  # fmt: skip
        return _Curves.of({name: time / share for name, time in times.items()})


@dataclass(frozen=True)
class _Candidate:
    structure: Structure | None  # None for the dense layer
    arrangement: str


def _taken(
    candidates: Mapping[_Candidate, nn.Module], ready: Callable[[nn.Module], Run], seconds: float, *,
    clock: Callable[[], float], at_once: int,
) -> dict[_Candidate, float]:  # fmt: skip
    """Milliseconds of the candidates, the dense one first; so many others are ready to run at once.

    Runtimes hold on to feature maps, which all together may not fit into memory. What is measured later is put in
    relation to the dense layer then.
    """
    (dense, layer), *others = candidates.items()
    times: dict[_Candidate, float] = {}
    for first in range(0, max(1, len(others)), at_once):
        chunk = others[first : first + at_once]
        turns = [ready(module) for module in (layer, *(module for _, module in chunk))]
        spend = seconds * len(chunk) / max(1, len(others))
        taken = milliseconds_in_turns(turns, spend, clock=clock, least_rounds=1, hopeless=HOPELESS)
        scale = times.setdefault(dense, taken[0]) / (taken[0] or 1.0)
        times |= {name: scale * time for (name, _), time in zip(chunk, taken[1:], strict=True)}
    return times


@dataclass(frozen=True)
class _Curves:
    """Milliseconds of the dense layer, and over R for each form in each arrangement."""

    dense: float
    points: dict[tuple[str, bool, str], tuple[list[int], list[float]]]

    @classmethod
    def of(cls, times: Mapping[_Candidate, float]) -> _Curves:
        points: dict[tuple[str, bool, str], tuple[list[int], list[float]]] = {}
        dense = 0.0
        for candidate, taken in times.items():
            if candidate.structure is None:
                dense = taken
                continue
            key = (candidate.structure.form, candidate.structure.even, candidate.arrangement)
            counts, milliseconds = points.setdefault(key, ([], []))
            counts.append(candidate.structure.components)
            milliseconds.append(taken)
        return cls(dense, points)

    def of_option(self, option: Option) -> dict[str, float]:
        """Milliseconds by arrangement, linear in R between measured points."""
        structure = option.structure
        if structure is None:
            return {"stages": self.dense}
        return {
            arrangement: float(np.interp(structure.components, *points))
            for (form, even, arrangement), points in self.points.items()
            if (form, even) == (structure.form, structure.even)
        }


def _with_time(option: Option, curves: Sequence[_Curves]) -> Option:
    """One arrangement serves all calls of a layer."""
    totals: dict[str, float] = {}
    for each in curves:
        for arrangement, taken in each.of_option(option).items():
            totals[arrangement] = totals.get(arrangement, 0.0) + taken
    if not totals:
        return replace(option, milliseconds=0.0)
    best = min(totals, key=totals.__getitem__)
    return replace(option, milliseconds=totals[best], arrangement=best)


def _in_blocks(menu: Menu, block: int) -> Menu:
    """Of the options those whose widths are multiples of the block, if there are any."""
    fitting = [option for option in menu.options[1:] if option.structure and option.structure.components % block == 0]
    return replace(menu, options=(menu.dense, *fitting)) if fitting else menu


def _arranged(
    layer: SeparableConv, shapes: Sequence[Shape], arrangements: Sequence[str] = ARRANGEMENTS
) -> dict[str, SeparableConv]:
    """Copies of a layer in each arrangement that it has and that may pay on inputs of these shapes.

    Image by image on the CPU alone: devices that run thousands of operations at once want all images.
    """

    def exceeds_cache(shape: Shape) -> bool:
        if layer.geometry.weight.device.type != "cpu":
            return False
        images, _, *size = shape if len(shape) == layer.axes + 2 else (1, *shape)
        return images > 1 and images * layer.components * math.prod(size) > LARGE

    found = {}
    for name in arrangements:
        if layer.can_run(name) and (name != "by image" or any(map(exceeds_cache, shapes))):
            found[name] = copy.deepcopy(layer)
            found[name].arrangement = name
    return found


def _coarse(options: Sequence[Option], count: int) -> Iterator[Structure]:
    """Of each form, some ranks from the smallest to the largest in equal ratios, in rising order."""
    structures = [option.structure for option in options if option.structure is not None]
    for form, even in dict.fromkeys((each.form, each.even) for each in structures):
        own = [each for each in structures if (each.form, each.even) == (form, even)]
        least, most = min(each.components for each in own), max(each.components for each in own)
        wanted = [least * (most / least) ** (index / (count - 1)) for index in range(count)]
        chosen = {min(own, key=lambda each: abs(math.log(each.components / size))) for size in wanted}
        yield from sorted(chosen, key=lambda each: each.components)


def _dense(original: Equivalent) -> nn.Module:
    """A convolution like the original, without the hooks and attributes that a model's own may have."""
    spec, weight = ConvSpec.of(original.conv), original.conv.weight
    conv = spec.conv(device=weight.device, dtype=weight.dtype)
    return conv if original.pad is None else nn.Sequential(original.pad, conv)


@torch.no_grad()
def with_noise(model: M) -> M:
    """Random numbers of a fitting size in every split layer: for timing, where fitting would only waste time."""
    for layer in model.modules():
        if isinstance(layer, SeparableConv):
            for stage in layer.stages.values():
                if is_plain(stage):
                    stage.weight.normal_(0, stage.weight[0].numel() ** -0.5)
    return model


def _inference(module: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            for x in inputs:
                module(x)

    return run


def _forward_and_backward(module: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    parameters = [x, *(p.requires_grad_() for p in module.parameters())]

    def run() -> None:
        y = module(x)
        torch.autograd.grad(y, parameters, torch.ones_like(y), allow_unused=True)

    return run


def fastest_arrangement(layer: SeparableConv, shapes: Sequence[Shape], *, seconds: float = 1.0) -> str:
    """The arrangement in which a layer takes the least time on inputs of these shapes, in inference."""
    arranged = _arranged(layer, shapes)
    if len(arranged) == 1:
        return next(iter(arranged))
    weight = layer.geometry.weight
    inputs = [torch.randn(shape, device=weight.device).to(weight.dtype) for shape in dict.fromkeys(shapes)]
    turns = [_inference(candidate, *inputs) for candidate in arranged.values()]
    times = milliseconds_in_turns(turns, seconds, clock=runtime_of("torch").clock(weight.device))
    return min(zip(times, arranged, strict=True))[1]
