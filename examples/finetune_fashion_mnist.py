"""The whole story on Fashion-MNIST: train, convert, repair, distil without labels, against training from scratch.

python examples/finetune_fashion_mnist.py [FOLDER]     # some minutes; downloads 30 MB where the folder lacks them

Needs torchvision (`pip install torchvision`).
"""

import argparse
import copy

import torch
import torchvision
from digits import small_resnet, train
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from convsplit.tables import Table, count


def fashion(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: float [N, 1, 14, 14] in -1..1 and int64 [N]."""
    found = []
    for training in (True, False):
        data = torchvision.datasets.FashionMNIST(folder, train=training, download=True)
        found += [F.avg_pool2d(data.data[:, None].float(), 2) / 128 - 1, data.targets]
    return tuple(found)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        answers = torch.cat([model.eval()(batch).argmax(1) for batch in images.split(500)])
    return float((answers == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=12_000, help="training images to use")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--params", type=float, default=0.1)
    arguments = parser.parse_args()
    train_x, train_y, test_x, test_y = fashion(arguments.folder)
    train_x, train_y = train_x[: arguments.images], train_y[: arguments.images]
    model = small_resnet(seed=0)
    for _ in track(train(model, train_x, train_y, arguments.epochs), "Training", total=arguments.epochs):
        pass
    model.eval()
    rows = []

    def note(step: str, network: nn.Module) -> None:
        params = count(sum(p.numel() for p in network.parameters()))
        rows.append([step, params, f"{accuracy(network, test_x, test_y):.3f}"])

    note("dense", model)
    batches = list(train_x[:512].split(64))
    budget = convsplit.Budget(params=arguments.params)
    note("converted, no data", convsplit.convert(model, test_x[:1], budget=budget))
    converted = convsplit.convert(model, test_x[:1], budget=budget, calibration=batches, progress=True)
    note("converted and refitted, 512 images", converted)
    convsplit.distill(converted, model, train_x, epochs=arguments.epochs, progress=True)
    note("distilled, no labels", converted)
    scratch = copy.deepcopy(converted)
    for module in scratch.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for _ in track(train(scratch, train_x, train_y, arguments.epochs), "From scratch", total=arguments.epochs):
        pass
    note("same architecture from scratch, with labels", scratch)
    Console().print(Table(["", "parameters", "accuracy"], rows, frozenset({""})).rich())


if __name__ == "__main__":
    main()
