"""export: a file for another runtime, kept only if what it computes is what the module computes.

Batch norm is folded first. The file is written beside its destination, loaded in the runtime it is for, run on the
example inputs and, where dimensions may vary, on larger ones; only then it takes its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from convsplit.folding import folded
from convsplit.measure.timing import prepared, time_runs
from convsplit.model.copies import scratch_copy
from convsplit.model.guards import plain_arithmetic, same_globals
from convsplit.model.running import Batch, Forward, device_of, moved, quiet_run, run_or_explain, tensors_in
from convsplit.runtimes import runtime_of
from convsplit.runtimes.onnx_models import as_arrays, flattened, sizes_that_vary, write_onnx
from convsplit.runtimes.onnx_runtimes import FromOnnx
from convsplit.tables import milliseconds, share, times_faster

SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml", "torch": ".pt2"}

Outputs = list[Tensor]


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked; prints in words.

    `difference` is the largest one between an output of the file and that of the module, over the largest value of that
    output; `milliseconds` are those of the module, folded and in eager PyTorch, and of the file, on as many threads.
    """

    path: Path
    files: tuple[Path, ...]
    runtime: str
    version: str
    difference: float
    milliseconds: tuple[float, float]
    threads: int
    dynamic: tuple[int, ...] = ()

    def __str__(self) -> str:
        slow, fast = self.milliseconds
        size = sum(file.stat().st_size for file in self.files) / 1e6
        return (
            f"{self.path} ({size:.1f} MB) in {self.runtime} {self.version}: outputs differ by {share(self.difference)} "
            f"of the largest value; {milliseconds(slow)} ms in eager PyTorch, {milliseconds(fast)} ms from the file "
            f"({times_faster(slow, fast)}{', slower' if fast > slow else ''}), {self.threads} "
            f"thread{'s' * (self.threads != 1)}"
        )


@same_globals()
@plain_arithmetic()
def export(
    converted: nn.Module,
    path: str | Path,
    example_inputs: Batch,
    *,
    runtime: str = "onnxruntime",
    dynamic: Sequence[int] = (),
    forward: Forward | None = None,
    seconds: float = 1.0,
) -> Exported:
    """Write a model as a file that another runtime serves, and check it before it is kept.

    Args:
        converted: the model, converted or not; it is not changed. Its batch norm is folded in the file.
        path: the file: `.onnx` for "onnxruntime", `.xml` (with a `.bin` beside it) for "openvino", `.pt2` for "torch".
        example_inputs: what the model is called with; its tensors become the inputs of the file, in order.
        runtime: "onnxruntime", "openvino" or "torch" (`torch.export`, without Python code).
        dynamic: dimensions of every input that may have other sizes later: `(0,)` for the batch, `(0, 2, 3)` for the
            size of images too. The file is then also checked with more inputs or twice the size.
        forward: how to run the model on `example_inputs`; what it does goes into the file.
        seconds: about how long to time the module, and the file.

    Raises:
        ValueError: the model cannot be exported, the runtime does not take the file, or its outputs are others; says
            why, and leaves what was at `path`.
        ImportError: a runtime that is not installed.

    >>> import convsplit, tempfile
    >>> model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export(convsplit.convert(model), f"{folder}/small.pt2", torch.randn(1, 8, 9, 9), runtime="torch")
    >>> done.difference < 1e-4
    True
    """
    path, where, axes = Path(path), runtime_of(runtime), tuple(sorted({*dynamic}))
    if SUFFIXES.get(where.name) != path.suffix:
        known = ", ".join(f"{suffix} for {name!r}" for name, suffix in SUFFIXES.items())
        raise ValueError(f"export to {path.name} for runtime {where.name!r}: want {known}")
    model = scratch_copy(converted)
    if where.name != "torch":  # these files are checked on the CPU, and know of no device
        model.cpu()
        example_inputs = moved(example_inputs, "cpu")
    smaller = folded(model, example_inputs, forward)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".export") as folder:
        draft = Path(folder) / path.name
        _write(smaller, draft, _at_least_two(example_inputs, axes), forward, axes)
        difference = _checked(model, draft, example_inputs, forward, axes)
        times = _timed(smaller, draft, example_inputs, forward, seconds)
        files = tuple(path.parent / file.name for file in sorted(Path(folder).iterdir()))
        for file in files:
            shutil.move(Path(folder) / file.name, file)
    threads = torch.get_num_threads()
    return Exported(path, files, where.name, where.version, difference, times, threads, axes)


def _write(model: nn.Module, path: Path, batch: Batch, forward: Forward | None, axes: Sequence[int]) -> None:
    if path.suffix == ".onnx":
        write_onnx(model, batch, path, forward=forward, dynamic=axes)
        return
    if path.suffix == ".xml":
        import openvino

        with TemporaryDirectory() as folder:
            write_onnx(model, batch, Path(folder) / "model.onnx", forward=forward, dynamic=axes)
            openvino.save_model(
                openvino.Core().read_model(str(Path(folder) / "model.onnx")), path, compress_to_fp16=False
            )
        return
    flat, tensors = flattened(model, batch, forward)
    try:
        with quiet_run(model):
            program = torch.export.export(flat, tensors, dynamic_shapes=sizes_that_vary(flat, tensors, axes))
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be exported: {type(error).__name__}: {error}") from error
    torch.export.save(program, path)


def _loaded(path: Path) -> Callable[[Batch], Outputs]:
    """The file as a function of a batch, in its runtime."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda batch: list(tensors_in(module(*tensors_in(batch))))
    runtime = runtime_of(next(name for name, suffix in SUFFIXES.items() if suffix == path.suffix))
    assert isinstance(runtime, FromOnnx)
    infer = runtime.load(path)
    return lambda batch: [torch.from_numpy(array) for array in infer(as_arrays(batch))]


@same_globals()
def _checked(model: nn.Module, path: Path, batch: Batch, forward: Forward | None, axes: Sequence[int]) -> float:
    """The largest difference between the file and the module, relative to the largest value of the output.

    On one thread: with several on busy cores ONNX Runtime 1.32 was now and then off by 1 %, in runs of one session.
    """
    torch.set_num_threads(1)
    run, worst = _loaded(path), 0.0
    for each in [batch, *([_larger(batch, axes)] if axes else [])]:
        with quiet_run(model):
            wanted = list(tensors_in(run_or_explain(model, each, forward)))
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(each))
        try:
            found = run(each)
        except Exception as error:
            raise ValueError(f"{path.name} is not kept: it does not run on inputs {shapes}: {error}") from error
        worst = max(worst, _difference(path, found, wanted, shapes))
    return worst


def _difference(path: Path, found: Outputs, wanted: Outputs, shapes: str) -> float:
    if [each.shape for each in found] != [each.shape for each in wanted]:
        sizes = [[tuple(each.shape) for each in side] for side in (found, wanted)]
        raise ValueError(
            f"{path.name} is not kept: on inputs {shapes} it gives outputs {sizes[0]}, the module {sizes[1]}"
        )
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        largest = float(other.double().abs().max()) if other.numel() else 0.0
        moved = float((one.double() - other.double()).abs().max()) / (largest or 1.0) if other.numel() else 0.0
        allowed = torch.finfo(other.dtype).eps ** 0.5 if other.is_floating_point() else 0.0
        if not moved <= allowed:  # NaN, too
            raise ValueError(
                f"{path.name} is not kept: on inputs {shapes} its outputs differ from the module's by {moved:.3g} of "
                f"the largest value; at most {allowed:.1g} is rounding"
            )
        worst = max(worst, moved)
    return worst


def _timed(
    model: nn.Module, path: Path, batch: Batch, forward: Forward | None, seconds: float
) -> tuple[float, float]:
    """Milliseconds of the module and of the file, in turns."""
    run, eager = _loaded(path), runtime_of("torch")

    def from_file() -> None:
        with torch.no_grad():
            run(batch)

    ready = [prepared(eager, model, batch, forward), from_file]
    before, after = time_runs(ready, eager.clock(device_of(model, batch)), seconds=seconds)
    return before.total, after.total


def _at_least_two(batch: Batch, axes: Sequence[int]) -> Batch:
    """Exporters take a size of 1 for a constant."""
    return _resized(batch, axes, lambda axis, size: max(2, size))


def _larger(batch: Batch, axes: Sequence[int]) -> Batch:
    """One more input, and twice the size in other dimensions: what asks for multiples gets them."""
    return _resized(batch, axes, lambda axis, size: size + 1 if axis == 0 else 2 * size)


def _resized(batch: Batch, axes: Sequence[int], size_of: Callable[[int, int], int]) -> Batch:
    def resized(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for axis in axes:
            if axis < value.dim():
                places = torch.arange(size_of(axis, value.shape[axis]), device=value.device) % value.shape[axis]
                value = value.index_select(axis, places)
        return value

    return tree_map(resized, batch)
