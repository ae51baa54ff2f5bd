"""Eight bits after splitting: accuracy and milliseconds of dense and converted networks, before and after quantisation.

    python -m benchmarks eight_bits [NETWORKS.py] [--depths 20 56] [--kept 0.5 0.25] [--images 2000]

NETWORKS.py as in benchmarks/subjects.py; without it the network of the digits. Static quantisation, per output
channel, calibrated on 256 unlabelled training images: `onnxruntime.quantization` (QDQ) for ONNX Runtime, NNCF for
OpenVINO. Conversions are repaired with 512. "ranges": what one scale for all channels has to bridge, the largest
range of a channel that enters the depthwise stage over that of the median channel, of the median layer and of the
worst. "equalised": these ranges made equal.
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


def quantised_onnx(path: Path, calibration: Tensor) -> Path:
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

    ready, target = path.with_suffix(".ready.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(path, ready)
    quantization.quantize_static(ready, target, Reader(), per_channel=True, reduce_range=False)
    return target


def quantised_openvino(path: Path, calibration: Tensor) -> Path:
    """OpenVINO's model in eight bits, by NNCF."""
    import nncf
    import openvino

    data = nncf.Dataset([batch.numpy() for batch in calibration.split(32)])
    model = nncf.quantize(openvino.Core().read_model(str(path)), data, subset_size=len(calibration) // 32)
    target = path.with_suffix(".int8.xml")
    openvino.save_model(model, target, compress_to_fp16=False)
    return target


QUANTISERS = {"onnxruntime": quantised_onnx, "openvino": quantised_openvino}


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
    parser.add_argument("--runtimes", nargs="+", default=list(QUANTISERS))


QUICK = {"kept": [0.25], "images": 500, "runtimes": ["onnxruntime"]}


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
        with tempfile.TemporaryDirectory() as folder:
            files = {n: exported(m, Path(folder), f"m{i}", train[:2]) for i, (n, m) in enumerate(models.items())}
            for name in arguments.runtimes:
                runtime = runtime_of(name)
                assert isinstance(runtime, FromOnnx)
                pairs = {}
                for kind, path in files.items():
                    pairs[kind] = (runtime.load(path), runtime.load(QUANTISERS[name](path, train[:CALIBRATION])))
                batch = [images[:8].numpy()]
                flat = [infer for pair in pairs.values() for infer in pair]
                turns = [lambda infer=infer, batch=batch: infer(batch) and None for infer in flat]
                times = milliseconds_in_turns(turns, 10.0, clock=runtime.clock(torch.device("cpu")))
                for index, (kind, pair) in enumerate(pairs.items()):
                    right = [accuracy(infer, images, labels) for infer in pair]
                    slow, fast = times[2 * index : 2 * index + 2]
                    rows.append(
                        [subject.name, name, kind, percent(right[0]), percent(right[1]), milliseconds(slow),
                         milliseconds(fast), f"{times[0] / fast:.2f}x", spread(models[kind], train[:CALIBRATION])]
                    )  # fmt: skip
    keys = ["network", "runtime", "kept"]
    headings = [*keys, "float32", "eight bits", "ms", "->", "than dense float32", "ranges"]
    kinds = {"float32": SCORE, "eight bits": SCORE, "than dense float32": FASTER}
    yield Sheet("eight bits", Table(headings, rows, frozenset(keys)), keys, kinds)
