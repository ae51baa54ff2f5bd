"""The way back to full accuracy: repair, block reconstruction and distillation without labels, against training anew.

    python -m benchmarks finetuning NETWORKS.py [--depths 20 56] [--kept 0.25 0.125] [--seeds 0] [--seconds 300]
    python -m benchmarks finetuning             # only the table and the picture of what was run before

NETWORKS.py as in benchmarks/subjects.py. Every way starts from the same refitted network and may use `--seconds`;
training from scratch gets the same architecture, the labels and the same time. Every result is kept in
results/finetuning.json at once, so a run may be stopped and continued, and several may run side by side.
"""

from __future__ import annotations

import copy
import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import convsplit
from benchmarks.figures import compared
from benchmarks.results import DRIFT, POINTS, STORED, Sheet
from benchmarks.subjects import ROOT, answers, load_networks
from convsplit import Budget
from convsplit.finetune.reconstruction import schedule
from convsplit.tables import Table

RESULTS, PICTURE = STORED / "finetuning.json", ROOT / "docs" / "images" / "finetuning.png"
WAYS = [
    "converted, no data", "refitted", "refitted, reconstructed", "refitted, distilled",
    "refitted, reconstructed, distilled", "in two steps", "from scratch, labels",
]  # fmt: skip


def moved(images: Tensor) -> Tensor:
    """Augmentation: each image mirrored by chance and shifted by up to two pixels, its edges reflected."""
    N = len(images)
    images = torch.where(torch.rand(N, 1, 1, 1) < 0.5, images.flip(3), images)
    windows = F.pad(images, (2, 2, 2, 2), mode="reflect").unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    down, right = torch.randint(5, (2, N))
    return windows[torch.arange(N), :, down, right]


def mixed(images: Tensor) -> Tensor:
    """The same, and half of them blended with another: a teacher needs no labels for what it sees."""
    images = moved(images)
    share = torch.where(torch.rand(len(images)) < 0.5, torch.rand(len(images)), 1.0).view(-1, 1, 1, 1)
    return share * images + (1 - share) * images[torch.randperm(len(images))]


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
) -> tuple[nn.Module, convsplit.finetune.Distillation]:
    """Progressive conversion: to the root of the fraction, a third of the distillation, then the rest of both."""
    halfway = convsplit.convert(model, images[:1], budget=Budget(params=kept**0.5), calibration=few, seed=seed)
    convsplit.distill(halfway, model, images, epochs=10_000, seconds=seconds / 3, augment=mixed, seed=seed)
    dense = convsplit.merge(halfway)
    network = convsplit.convert(dense, images[:1], budget=Budget(params=kept), calibration=few, seed=seed)
    convsplit.refit(network, model, few, seed=seed)
    course = convsplit.distill(
        network, model, images, epochs=10_000, seconds=seconds * 2 / 3, augment=mixed, seed=seed
    )
    return network, course


Way = tuple[str, nn.Module, float, convsplit.finetune.Distillation | None]


def ways(
    model: nn.Module, kept: float, seed: int, images: Tensor, labels: Tensor, wanted: list[str], seconds: float
) -> Iterator[Way]:
    """The wanted ways back, with the network each gives, the seconds it took and its course."""

    def since(start: float) -> float:
        return time.perf_counter() - start

    def distilled(begin: nn.Module, seconds: float) -> tuple[nn.Module, float, convsplit.finetune.Distillation]:
        network, start = copy.deepcopy(begin), time.perf_counter()
        course = convsplit.distill(network, model, images, epochs=10_000, seconds=seconds, augment=mixed, seed=seed)
        return network, since(start), course

    if "converted, no data" in wanted:
        start = time.perf_counter()
        converted = convsplit.convert(model, images[:1], budget=Budget(params=kept), seed=seed)
        yield "converted, no data", converted, since(start), None
    if wanted == ["converted, no data"]:
        return
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    few, more = list(images[order[:512]].split(64)), list(images[order[:2048]].split(64))
    start = time.perf_counter()
    refitted = convsplit.convert(model, images[:1], budget=Budget(params=kept), calibration=few, seed=seed)
    yield "refitted", refitted, since(start), None

    if "refitted, distilled" in wanted:
        yield "refitted, distilled", *distilled(refitted, seconds)
    if {"refitted, reconstructed", "refitted, reconstructed, distilled"} & set(wanted):
        reconstructed, start = copy.deepcopy(refitted), time.perf_counter()
        convsplit.reconstruct(reconstructed, model, more, seed=seed)
        spent = since(start)
        yield "refitted, reconstructed", reconstructed, spent, None
    if "refitted, reconstructed, distilled" in wanted:
        network, took, course = distilled(reconstructed, max(seconds - spent, 1.0))
        yield "refitted, reconstructed, distilled", network, spent + took, course
    if "in two steps" in wanted:
        start = time.perf_counter()
        network, course = in_two_steps(model, kept, seed, images, few, seconds)
        yield "in two steps", network, since(start), course
    if "from scratch, labels" in wanted:
        start = time.perf_counter()
        yield "from scratch, labels", from_scratch(refitted, images, labels, seconds, seed), since(start), None


def run(arguments: Namespace) -> None:
    """Measure what was asked for and is not known yet."""
    train_x, train_y, test_x, test_y = (networks := load_networks(arguments.networks)).cifar10()
    train_x, train_y = train_x[: arguments.images], train_y[: arguments.images]
    for depth in arguments.depths:
        model = networks.resnet(depth)
        dense = answers(model, test_x)
        for kept in arguments.kept:
            for seed in arguments.seeds:
                case = f"ResNet-{depth}", kept, seed
                wanted = [way for way in arguments.ways if (*case, way) not in map(key, known())]
                if not wanted:
                    continue
                for way, network, seconds, course in ways(
                    model, kept, seed, train_x, train_y, wanted, arguments.seconds
                ):
                    quality = compared(dense, answers(network, test_x), test_y)
                    result = {
                        "network": case[0], "kept": kept, "seed": seed, "way": way, "seconds": round(seconds),
                        "lost": round(quality.points, 2), "agreement": round(quality.same, 1),
                        "drift": round(quality.moved, 3),
                        "threads": torch.get_num_threads(),
                    }  # fmt: skip
                    if course is not None:
                        checks = [[round(c.seconds, 1), round(c.drift, 4), round(c.loss, 4)] for c in course.checks]
                        result |= {"lr": course.lr, "steps": course.checks[-1].step, "course": checks}
                    print({name: value for name, value in result.items() if name != "course"}, flush=True)
                    others = [other for other in known() if key(other) != key(result)]
                    RESULTS.write_text(json.dumps([*others, result], indent=1) + "\n")


def known() -> list[dict[str, Any]]:
    """All results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def key(result: dict[str, Any]) -> tuple[str, float, int, str]:
    return result["network"], result["kept"], result["seed"], result["way"]


def table(results: list[dict[str, Any]]) -> Table:
    """Means over seeds, and the points lost of each."""
    rows = []
    for network, kept, way in sorted({(r["network"], -r["kept"], r["way"]) for r in results}, key=_place):
        each = sorted((r for r in results if (r["network"], -r["kept"], r["way"]) == (network, kept, way)), key=key)
        lost = [r["lost"] for r in each]
        rows.append(
            [network, f"{-kept:g}", way, f"{mean(lost):.2f}", " ".join(f"{points:.2f}" for points in lost),
             f"{mean(r['agreement'] for r in each):.1f} %", f"{mean(r['drift'] for r in each):.3f}",
             f"{mean(r['seconds'] for r in each):.0f}", "/".join(sorted({str(r["threads"]) for r in each}))]
        )  # fmt: skip
    headings = ["network", "kept", "way", "points lost", "by seed", "agreement", "drift", "seconds", "threads"]
    return Table(headings, rows, frozenset({"network", "way", "by seed"}))


def _place(row: tuple[str, float, str]) -> tuple[str, float, int]:
    return *row[:2], WAYS.index(row[2])


def picture(results: list[dict[str, Any]]) -> None:
    """Points lost against the parameters kept, and the course of the distillations, a column for each network."""
    from matplotlib import pyplot

    networks = sorted({r["network"] for r in results})
    figure, axes = pyplot.subplots(2, len(networks), figsize=(5.2 * len(networks), 7), squeeze=False, sharey="row")
    for column, network in zip(axes.T, networks, strict=True):
        for color, (style, way) in enumerate(zip(["+:", "o:", "v:", "s-", "^-", "P-", "X--"], WAYS, strict=True)):
            own = [r for r in results if r["network"] == network and r["way"] == way]
            points = {k: mean(r["lost"] for r in own if r["kept"] == k) for k in sorted({r["kept"] for r in own})}
            if points:
                column[0].plot(
                    [100 * kept for kept in points], list(points.values()), style, color=f"C{color}", label=way
                )
        column[0].axhline(0, color="0.4", linewidth=1, label="dense")
        column[0].set(title=network, xlabel="parameters of the convolutions kept (%)", xscale="log")
        column[0].set_xticks([12.5, 25], ["12.5", "25"])
        column[0].minorticks_off()
        for r in results:
            if r["network"] == network and r["way"] == "refitted, distilled":
                seconds, _, loss = zip(*r["course"], strict=True)
                label = f"{100 * r['kept']:g} % kept" if r["seed"] == 0 else None
                column[1].plot(seconds, loss, "C0-" if r["kept"] > 0.2 else "C1--", label=label, linewidth=1)
        column[1].set(xlabel="seconds of distillation, three seeds")
        for axis in column:
            axis.grid(alpha=0.3)
        column[1].set_ylim(bottom=0)
        column[0].set_yscale("symlog", linthresh=10)  # without data an eighth loses more than 60
        column[0].set_ylim(-2, 90)
        column[0].set_yticks([0, 2, 5, 10, 20, 50], ["0", "2", "5", "10", "20", "50"])
    axes[0][0].set_ylabel("points of accuracy lost")
    axes[1][0].set_ylabel("divergence from the dense network, held out")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=6, fontsize=8)
    axes[1][-1].legend(fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(PICTURE, dpi=110)


def options(parser: ArgumentParser) -> None:
    parser.add_argument("networks", nargs="?", help="a file with trained networks; without, nothing is run")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)


QUICK = {"networks": None}  # the table of what was run before


def measure(arguments: Namespace) -> Iterator[Sheet]:
    if arguments.networks:
        run(arguments)
    results = known()
    if not arguments.quick:
        picture(results)
    yield Sheet("finetuning", table(results), ["network", "kept", "way"], {"points lost": POINTS, "drift": DRIFT})
