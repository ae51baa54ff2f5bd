"""What conversion gains in measured time: whole models, dense and converted in turns, in one run.

    python -m benchmarks latency [--networks NETWORKS.py] [--models vgg16_bn resnet18 resnet50] [--batches 1 8]
    python -m benchmarks latency --runtimes onnxruntime openvino torch --budgets macs=0.25 --threads 1 --no-layers

Torchvision models at 224 x 224 have random weights: time does not depend on them, though the choice of layers to spend
a budget on does. So have yolov8n (ultralytics) at 320 x 320 and unet (segmentation_models_pytorch, on a ResNet-18) at
224 x 224. NETWORKS.py (as in benchmarks/subjects.py) adds its ResNet-56 at batch 64. For each
budget, layout and batch size the kept fraction of MACs, the milliseconds before and after, the speed-up, and which
part of the speed-up that the MACs promise was reached; then, layer by layer, where that part is low.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import convsplit
from benchmarks import subjects
from benchmarks.results import FASTER, Sheet
from convsplit import Budget
from convsplit.cli.arguments import budget
from convsplit.measure.bench import LAYOUTS
from convsplit.measure.stopwatch import Stopwatch
from convsplit.tables import Table, times_faster

KEYS = {"budget", "batch", "runtime", "threads", "layout"}
BUDGETS = [Budget(macs=0.5), Budget(macs=0.25), Budget(latency=0.5)]
Case = tuple[str, nn.Module, Tensor, list[int]]


def cases(arguments: Namespace) -> Iterator[Case]:
    """Name, model, an image, and batch sizes."""
    if arguments.models:
        for name in arguments.models:
            if name == "digits":
                subject = subjects.digits()
                yield name, subject.model, subject.images[:1], arguments.batches
                continue
            size = 320 if name == "yolov8n" else 224
            yield name, network(name), torch.randn(1, 3, size, size), arguments.batches
    if arguments.networks:
        yield "ResNet-56", subjects.load_networks(arguments.networks).resnet(56), torch.randn(1, 3, 32, 32), [64]


def network(name: str) -> nn.Module:
    """With random weights, in eval mode."""
    if name == "yolov8n":
        from ultralytics import YOLO

        return YOLO("yolov8n.yaml").model.eval()
    if name == "unet":
        import segmentation_models_pytorch as smp

        return smp.Unet("resnet18", encoder_weights=None).eval()
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval()


def layers(model: nn.Module, image: Tensor, batch: int) -> Table:
    """At a quarter of the MACs, channels-last: equal layers together, those that keep least of the promise first."""
    images = image.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    plan = convsplit.make_plan(
        model, images, budget=Budget(macs=0.25), prefer="speed", stopwatch=Stopwatch(seconds=20)
    )
    model.to(memory_format=torch.contiguous_format)
    found = {}
    for layer in plan.split:
        (slow, fast), (before, after) = layer.milliseconds, layer.macs
        key = (layer.spec.weight_shape, layer.spec.stride, before, layer.option.structure)
        found.setdefault(key, []).append((slow, fast, after))
    rows = []
    for (shape, stride, before, form), each in found.items():
        slow, fast, after = (sum(column) / len(each) for column in zip(*each, strict=True))
        size = "x".join(map(str, shape)) + (f"/{stride[0]}" if stride != (1, 1) else "")
        promised = before / after
        rows.append(
            (slow / fast / promised, [size, form, str(len(each)), f"{slow:.2f}", f"{fast:.2f}",
             times_faster(slow, fast), f"{promised:.2f}x", f"{slow / fast / promised:.2f}"])
        )  # fmt: skip
    headings = ["kernel", "form", "layers", "ms", "->", "faster", "promised", "part"]
    return Table(headings, [row for _, row in sorted(rows, key=lambda pair: pair[0])], frozenset({"kernel", "form"}))


def options(parser: ArgumentParser) -> None:
    parser.add_argument("--networks", help="a file with trained networks")
    parser.add_argument("--models", nargs="*", default=["vgg16_bn", "resnet18", "resnet50"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--no-layers", action="store_true", help="leave the table of layers out")
    parser.add_argument("--runtimes", nargs="+", default=["torch"])
    parser.add_argument("--budgets", type=budget, nargs="+", default=BUDGETS, help="such as macs=0.25")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the layers of each case")
    parser.add_argument("--deployed", action="store_true")
    parser.add_argument("--device", default="cpu", help="cuda, with --runtimes torch torch.amp torch.cuda_graph")


QUICK = {
    "models": ["digits"], "batches": [64], "budgets": [Budget(macs=0.25)], "seconds": 2.0, "no_layers": True,
    "layouts": ["contiguous"], "runtimes": ["torch", "onnxruntime"],
}  # fmt: skip


def measure(arguments: Namespace) -> Iterator[Sheet]:
    torch.set_num_threads(arguments.threads)
    for name, model, image, batches in cases(arguments):
        model, image = model.to(arguments.device), image.to(arguments.device)
        for batch in batches:  # one by one, so that an interrupted run leaves what it has measured
            found = convsplit.bench(
                model, image, budgets=arguments.budgets, batch_sizes=[batch], threads=[arguments.threads],
                layouts=arguments.layouts, runtimes=arguments.runtimes, deployed=arguments.deployed,
                seconds=arguments.seconds,
            )  # fmt: skip
            table = found.table()
            keys = [heading for heading in table.headings if heading in KEYS]
            kinds = {heading: FASTER for heading in ("faster", "speedup") if heading in table.headings}
            yield Sheet(f"{name}, batch {batch}", table, keys, kinds, found.summary())
        if not arguments.no_layers:
            table = layers(model, image, batches[0])
            yield Sheet(f"{name}, layers", table, ["kernel", "form"], {"faster": FASTER})
