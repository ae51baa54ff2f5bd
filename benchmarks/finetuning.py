"""The way back to full accuracy: repair, block reconstruction and distillation without labels, against training anew.

    python benchmarks/finetuning.py NETWORKS.py [--depths 20 56] [--kept 0.25 0.125] [--seconds 300] [--plot FILE]

NETWORKS.py as for benchmarks/accuracy.py. Every way starts from the same refitted network and may use `--seconds`;
training from scratch gets the same architecture, the labels and the same time. Prints a Markdown table and the course
of every distillation.
"""

import argparse
import copy
import time
from collections.abc import Iterator

import torch
from accuracy import load_networks, measure
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from convsplit import Budget
from convsplit.finetune.reconstruct import schedule
from convsplit.tables import Table

LONG_WAYS = ["refitted, distilled", "refitted, reconstructed, distilled", "in two steps", "from scratch, labels"]


def moved(images: Tensor) -> Tensor:
    """Augmentation: mirrored by chance, and shifted by up to two pixels."""
    images = images.flip(3) if torch.rand(()) < 0.5 else images
    return images.roll(tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))


def from_scratch(model: nn.Module, images: Tensor, labels: Tensor, seconds: float, seed: int) -> nn.Module:
    """The same architecture trained with labels for as long: SGD with momentum, the recipe of such networks."""
    torch.manual_seed(seed)
    network = copy.deepcopy(model)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    start = time.perf_counter()
    while (share := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * schedule(share)
        chosen = torch.randint(len(images), (64,))
        loss = F.cross_entropy(network.train()(moved(images[chosen])), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def in_two_steps(
    model: nn.Module, kept: float, seed: int, images: Tensor, few: list[Tensor], seconds: float
) -> tuple[nn.Module, convsplit.Distillation]:
    """Progressive conversion: to the root of the fraction, a third of the distillation, then the rest of both."""
    halfway = convsplit.convert(model, images[:1], budget=Budget(params=kept**0.5), calibration=few, seed=seed)
    convsplit.distill(halfway, model, images, epochs=10_000, seconds=seconds / 3, augment=moved, seed=seed)
    dense = convsplit.merge(halfway)
    network = convsplit.convert(dense, images[:1], budget=Budget(params=kept), calibration=few, seed=seed)
    convsplit.refit(network, model, few, seed=seed)
    course = convsplit.distill(
        network, model, images, epochs=10_000, seconds=seconds * 2 / 3, augment=moved, seed=seed
    )
    return network, course


Way = tuple[str, nn.Module, float, convsplit.Distillation | None]


def ways(
    model: nn.Module, kept: float, seed: int, images: Tensor, labels: Tensor, arguments: argparse.Namespace
) -> Iterator[Way]:
    """Each way back, with the network it gives and the seconds it took."""

    def since(start: float) -> float:
        return time.perf_counter() - start

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    few, more = list(images[order[:512]].split(64)), list(images[order[:2048]].split(64))
    start = time.perf_counter()
    refitted = convsplit.convert(model, images[:1], budget=Budget(params=kept), calibration=few, seed=seed)
    yield "refitted", refitted, since(start), None

    reconstructed, start = copy.deepcopy(refitted), time.perf_counter()
    convsplit.reconstruct(reconstructed, model, more, seed=seed)
    spent = since(start)
    yield "refitted, reconstructed", reconstructed, spent, None

    for way, begin, seconds in (
        ("refitted, distilled", refitted, arguments.seconds),
        ("refitted, reconstructed, distilled", reconstructed, arguments.seconds - spent),
    ):
        if seconds <= 0 or way not in arguments.ways:
            continue
        network, start = copy.deepcopy(begin), time.perf_counter()
        course = convsplit.distill(network, model, images, epochs=10_000, seconds=seconds, augment=moved, seed=seed)
        yield way, network, since(start), course

    if "in two steps" in arguments.ways:
        start = time.perf_counter()
        network, course = in_two_steps(model, kept, seed, images, few, arguments.seconds)
        yield "in two steps", network, since(start), course

    if "from scratch, labels" in arguments.ways:
        start = time.perf_counter()
        yield (
            "from scratch, labels",
            from_scratch(refitted, images, labels, arguments.seconds, seed),
            since(start),
            None,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=LONG_WAYS, choices=LONG_WAYS)
    parser.add_argument("--plot", help="an image file: points lost against parameters kept")
    arguments = parser.parse_args()
    train_x, train_y, test_x, test_y = (networks := load_networks(arguments.networks)).cifar10()
    train_x, train_y = train_x[: arguments.images], train_y[: arguments.images]
    rows: list[list[str]] = []
    courses: list[str] = []
    for depth in arguments.depths:
        model = networks.resnet(depth)
        for kept in arguments.kept:
            for seed in arguments.seeds:
                for way, network, seconds, course in ways(model, kept, seed, train_x, train_y, arguments):
                    figures = measure(model, network, test_x, test_y)
                    rows.append([f"ResNet-{depth}", f"{kept:g}", way, str(seed), *figures, f"{seconds:.0f}"])
                    Console(stderr=True, width=160).print(*rows[-1])
                    if course is not None:
                        losses = " ".join(f"{check.loss:.3f}" for check in course.checks)
                        courses.append(f"- {', '.join(rows[-1][:4])}, {course.checks[-1].step} steps: {losses}")
    headings = ["network", "kept", "way", "seed", "points lost", "agreement", "drift", "seconds"]
    print(Table(headings, rows, frozenset({"network", "way"})).markdown())
    print("\nLoss on held-out images over the course of each distillation, in 20 equal parts of the time:\n")
    print("\n".join(courses))
    if arguments.plot:
        plot(rows, arguments.plot)


def plot(rows: list[list[str]], path: str) -> None:
    """Points lost against the fraction of parameters kept, one line for each way."""
    from matplotlib import pyplot

    networks = sorted({row[0] for row in rows})
    figure, axes = pyplot.subplots(1, len(networks), figsize=(5 * len(networks), 3.6), squeeze=False, sharey=True)
    for axis, network in zip(axes[0], networks, strict=True):
        for way in dict.fromkeys(row[2] for row in rows):
            points = sorted((float(row[1]), float(row[4])) for row in rows if row[0] == network and row[2] == way)
            axis.plot(*zip(*points, strict=True), marker="o", label=way)
        axis.set(title=network, xlabel="parameters of the convolutions kept", xscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("points of accuracy lost")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
