"""The way back to full accuracy on real handwritten digits, step by step and without a label.

python examples/finetune_digits.py       # under a minute on two cores; needs nothing but scikit-learn's data
"""

import argparse
import copy
import time

import torch
from digits import digits, small_resnet, train
from rich.console import Console
from torch import Tensor, nn

import convsplit
from convsplit.tables import Table, count


def shifted(images: Tensor) -> Tensor:
    """Augmentation: the images moved by up to a pixel."""
    return images.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=float, default=0.08)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    train_x, train_y, test_x, test_y = digits()
    model = small_resnet(seed=0)
    for _ in train(model, train_x, train_y, arguments.epochs):
        pass
    model.eval()
    rows: list[list[str]] = []
    start = time.perf_counter()

    def note(step: str, network: nn.Module) -> None:
        nonlocal start
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            answers, wanted = network.eval()(test_x), model(test_x)
        drift = float((answers - wanted).norm() / wanted.norm())
        right = float((answers.argmax(1) == test_y).float().mean())
        params = count(sum(p.numel() for p in network.parameters()))
        rows.append([step, params, f"{right:.3f}", f"{drift:.3f}", f"{seconds:.1f}"])
        start = time.perf_counter()

    note("dense", model)
    converted = convsplit.convert(model, test_x[:1], budget=convsplit.Budget(params=arguments.params))
    note("converted, no data", converted)
    batches = list(train_x[:512].split(64))
    convsplit.refit(converted, model, batches)
    note("refitted, 512 images", converted)
    convsplit.reconstruct(converted, model, batches, steps=60)
    note("reconstructed block by block", converted)
    convsplit.distill(converted, model, train_x, epochs=arguments.epochs, augment=shifted)
    note("distilled, all images, no labels", converted)

    scratch = copy.deepcopy(converted)
    for module in scratch.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for _ in train(scratch, train_x, train_y, arguments.epochs):
        pass
    note("same architecture from scratch, with labels", scratch)
    Console().print(Table(["", "parameters", "accuracy", "drift", "seconds"], rows, frozenset({""})).rich())


if __name__ == "__main__":
    main()
