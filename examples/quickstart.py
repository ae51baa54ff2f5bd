"""Split the convolutions of a small residual network for handwritten digits, and see what it cost.

    python examples/quickstart.py            # about 20 seconds on two cores
    python examples/quickstart.py --train    # train the network first: half a minute more on two cores

The network comes trained (digits.safetensors, by train_digits.py), the digits with scikit-learn: 1,797 images of
8 x 8 pixels (E. Alpaydin and C. Kaynak, UCI, 1998).
"""

import argparse
import time

import torch
from digits import digits, trained
from rich.console import Console
from torch import nn
from train_digits import trained_anew

import convsplit
from convsplit import Budget
from convsplit.tables import Table, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="train the network anew instead of loading it")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    arguments = parser.parse_args()
    console = Console(width=130)
    model = trained_anew() if arguments.train else trained()
    _, _, images, labels = digits()
    dense = answers(model, images)
    rows = []

    def note(name: str, network: nn.Module, seconds: str = "") -> None:
        given = answers(network, images)
        right, same = (float((given.argmax(1) == wanted).float().mean()) for wanted in (labels, dense.argmax(1)))
        drift = float((given - dense).norm() / dense.norm())
        params = count(sum(p.numel() for p in network.parameters()))
        rows.append([name, params, f"{right:.4f}", f"{same:.4f}", f"{drift:.3f}", seconds])

    note("dense", model)
    study = convsplit.study(model, images[:1])  # of all budgets; each then costs an allocation and a conversion
    for fraction in arguments.budgets:
        start = time.perf_counter()
        plan = study.plan(Budget(params=fraction))
        converted = study.apply(plan)
        seconds = time.perf_counter() - start
        if len(rows) == 1:
            console.rule(f"The plan: {plan.budget}")
            console.print(str(plan), highlight=False)
            console.rule("The report")
            console.print(str(convsplit.compare(converted, model, images[:100])), highlight=False)
        note(f"params={fraction:g}", converted, f"{seconds:.1f}")
    console.rule("Accuracy on the test images, without any repair or training after the conversion")
    headings = ["model", "parameters", "accuracy", "agreement", "drift", "seconds"]
    console.print(Table(headings, rows, frozenset({"model"})).rich())


def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


if __name__ == "__main__":
    main()
