"""Eight bits after splitting: accuracy and milliseconds of dense and converted networks, before and after quantisation.

    python -m benchmarks eight_bits [NETWORKS.py] [--depths 20 56] [--kept 0.5 0.25] [--images 2000]

NETWORKS.py as in benchmarks/subjects.py; without it the network of the digits. Static quantisation, per output
channel, calibrated on 256 unlabelled training images: `onnxruntime.quantization` (QDQ) for ONNX Runtime, NNCF for
OpenVINO, torchao (pt2e for x86) for torch.compile. Conversions are repaired with 512. "reduced": one bit less of range
for weights (torchao: for activations), for processors whose kernels add products of eight bits in sixteen: x86 without
VNNI. "ranges": what one scale for all channels has to bridge, the largest range of a channel that enters the depthwise
stage over that of the median channel, of the median layer and of the worst. "equalised": these ranges made equal.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

import convsplit
from benchmarks.baselines.packages import compiled, torchao_int8
from benchmarks.results import FASTER, SCORE, Sheet
from benchmarks.subjects import add_options, subjects
from convsplit import Budget, SeparableConv2d
from convsplit.measure.timing import milliseconds_in_turns
from convsplit.runtimes import runtime_of
from convsplit.runtimes.onnx_runtimes import FromOnnx
from convsplit.tables import Table, milliseconds, percent

CALIBRATION = 256
Infer = Callable[[list[np.ndarray]], list[np.ndarray]]


def ranges(model: nn.Module, images: Tensor, stage: str) -> dict[str, Tensor]:
    """Of every pw-dw-pw layer the largest value of each channel that leaves a stage."""
    found: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SeparableConv2d) and m.form == "pw-dw-pw"}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: object, output: Tensor) -> None:
            found[name] = output.abs().amax((0, 2, 3))

        return hook

    hooks = [layer.stages[stage].register_forward_hook(note(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def equalised(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy in which all channels between the stages of a layer have one range; the products of stages stay.

    No ReLU stands between the stages, so a component's scale may move from one to the next: b s, c t / s, a / t. Ranges
    of channels decide s and t, as one scale quantises them all; weights have a scale for each output channel, which
    absorbs s and t / s.
    """
    model = copy.deepcopy(model)
    for first, second in (("pointwise_in", "depthwise"), ("depthwise", "pointwise_out")):
        for name, own in ranges(model, images, first).items():
            stages = model.get_submodule(name).stages
            factor = (own.max() / own.clamp(min=1e-3 * float(own.max()))).clamp(max=1e3)
            stages[first].weight.mul_(factor.view(-1, 1, 1, 1))
            across = (1, -1, 1, 1) if second == "pointwise_out" else (-1, 1, 1, 1)
            stages[second].weight.div_(factor.view(across))
    return model


def quantised_onnx(path: Path, calibration: Tensor, reduced: bool) -> Path:
    """The ONNX file in eight bits: QDQ, weights by channel."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    (given,) = onnx.load(path, load_external_data=False).graph.input

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{given.name: batch.numpy()} for batch in calibration.split(32)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    ready, target = path.with_suffix(".ready.onnx"), path.with_suffix(f".int8.{reduced}.onnx")
    quant_pre_process(path, ready)
    quantization.quantize_static(ready, target, Reader(), per_channel=True, reduce_range=reduced)
    return target


def quantised_openvino(path: Path, calibration: Tensor, reduced: bool) -> Path:
    """OpenVINO's model in eight bits, by NNCF."""
    import nncf
    import openvino
    from nncf.quantization import advanced_parameters as advanced

    data = nncf.Dataset([batch.numpy() for batch in calibration.split(32)])
    model = nncf.quantize(
        openvino.Core().read_model(str(path)), data, subset_size=len(calibration) // 32,
        advanced_parameters=advanced.AdvancedQuantizationParameters(
            overflow_fix=advanced.OverflowFix.ENABLE if reduced else None
        ),
    )  # fmt: skip
    target = path.with_suffix(f".int8.{reduced}.xml")
    openvino.save_model(model, target, compress_to_fp16=False)
    return target


class FromFiles:
    """An exported file and the same in eight bits, in a runtime that reads files."""

    def __init__(self, name: str) -> None:
        found = runtime_of(name)
        assert isinstance(found, FromOnnx)
        self.runtime, self.clock = found, found.clock(torch.device("cpu"))
        self.quantised = {"onnxruntime": quantised_onnx, "openvino": quantised_openvino}[name]

    def plain(self, model: nn.Module, path: Path) -> Infer:
        return self.runtime.load(path)

    def eight_bits(self, model: nn.Module, path: Path, calibration: Tensor, reduced: bool) -> Infer:
        return self.runtime.load(self.quantised(path, calibration, reduced))


class Compiled:
    """The module and the same in eight bits by torchao, compiled."""

    def __init__(self) -> None:
        self.clock = runtime_of("torch").clock(torch.device("cpu"))

    def plain(self, model: nn.Module, path: Path) -> Infer:
        torch._dynamo.reset()
        answer = compiled(model)

        def infer(arrays: list[np.ndarray]) -> list[np.ndarray]:
            with torch.no_grad():
                return [answer(torch.from_numpy(array)).numpy() for array in arrays]

        return infer

    def eight_bits(self, model: nn.Module, path: Path, calibration: Tensor, reduced: bool) -> Infer:
        return self.plain(torchao_int8(model, list(calibration.split(32)), reduced=reduced), path)


WAYS = ("onnxruntime", "openvino", "torchao")


def way(name: str) -> FromFiles | Compiled:
    return Compiled() if name == "torchao" else FromFiles(name)


def accuracy(infer: Infer, images: Tensor, labels: Tensor) -> float:
    scores = np.concatenate([infer([batch.numpy()])[0] for batch in images.split(100)])
    return float((torch.from_numpy(scores).argmax(1) == labels).float().mean())


def exported(model: nn.Module, folder: Path, name: str, image: Tensor) -> Path:
    return convsplit.export(model, folder / f"{name}.onnx", image, dynamic=(0,), seconds=0.1).path


def spread(model: nn.Module, images: Tensor) -> str:
    found = [float(own.max() / own.median()) for own in ranges(model, images, "pointwise_in").values()]
    return f"{median(found):.1f}, {max(found):.1f}" if found else ""


def options(parser: ArgumentParser) -> None:
    add_options(parser)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--forms", nargs="+", help="only these")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--runtimes", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--reduced", nargs="+", default=["no", "yes"], choices=["no", "yes"])


QUICK = {"kept": [0.25], "images": 500, "runtimes": ["onnxruntime"], "reduced": ["yes"]}


def measure(arguments: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for subject in subjects(arguments):
        dense, train = subject.model, subject.unlabelled
        images, labels = subject.images[: arguments.images], subject.labels[: arguments.images]
        models = {"dense": dense}
        study = convsplit.study(
            dense, train[:1], calibration=list(train[:512].split(64)), forms=arguments.forms, progress=False
        )
        for kept in arguments.kept:
            converted = study.convert(Budget(params=kept))
            models[f"{kept:.0%}"] = converted
            models[f"{kept:.0%} equalised"] = equalised(converted, train[:CALIBRATION])
        spreads = {kind: spread(model, train[:CALIBRATION]) for kind, model in models.items()}
        with tempfile.TemporaryDirectory() as folder:
            files = {n: exported(m, Path(folder), f"m{i}", train[:2]) for i, (n, m) in enumerate(models.items())}
            for name in arguments.runtimes:
                chosen = way(name)
                columns: dict[tuple[str, str], Infer] = {}
                for kind, path in files.items():
                    columns[kind, ""] = chosen.plain(models[kind], path)
                    for reduced in arguments.reduced:
                        columns[kind, reduced] = chosen.eight_bits(
                            models[kind], path, train[:CALIBRATION], reduced == "yes"
                        )
                batch = [images[:8].numpy()]
                turns = [lambda infer=infer, batch=batch: infer(batch) and None for infer in columns.values()]
                times = dict(zip(columns, milliseconds_in_turns(turns, 10.0, clock=chosen.clock), strict=True))
                right = {key: accuracy(infer, images, labels) for key, infer in columns.items()}
                rows += [
                    [subject.name, name, kind, reduced, percent(right[kind, ""]), percent(right[kind, reduced]),
                     milliseconds(times[kind, ""]), milliseconds(times[kind, reduced]),
                     f"{times['dense', ''] / times[kind, reduced]:.2f}x", spreads[kind]]
                    for kind in files for reduced in arguments.reduced
                ]  # fmt: skip
    keys = ["network", "runtime", "kept", "reduced"]
    headings = [*keys, "float32", "eight bits", "ms", "->", "than dense float32", "ranges"]
    kinds = {"float32": SCORE, "eight bits": SCORE, "than dense float32": FASTER}
    yield Sheet("eight bits", Table(headings, rows, frozenset(keys)), keys, kinds)
