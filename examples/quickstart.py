"""Train a small residual network on real handwritten digits, split its convolutions, and see what it cost.

    python examples/quickstart.py            # about a minute on two cores; needs nothing but scikit-learn's data

The digits come with scikit-learn: 1,797 images of 8 x 8 pixels (E. Alpaydin and C. Kaynak, UCI, 1998).
"""

import argparse
import time

import torch
from digits import digits, small_resnet, train
from rich.console import Console
from rich.progress import track

import convsplit
from convsplit.tables import Table, count


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    arguments = parser.parse_args()
    console = Console(width=130)

    train_x, train_y, test_x, test_y = digits()
    model = small_resnet(seed=0)
    for _ in track(train(model, train_x, train_y, arguments.epochs), "Training", total=arguments.epochs):
        pass
    dense = accuracy(model, test_x, test_y)
    params = sum(p.numel() for p in model.parameters())
    rows = [["dense", count(params), f"{dense:.4f}", "", "", ""]]

    for budget in arguments.budgets:
        start = time.perf_counter()
        plan = convsplit.make_plan(model, test_x[:1], budget=convsplit.Budget(params=budget))
        converted = convsplit.apply_plan(model, plan)
        seconds = time.perf_counter() - start
        report = convsplit.compare(model, converted, test_x)
        rows.append(
            [
                f"params={budget:g}", count(report.params[1]), f"{accuracy(converted, test_x, test_y):.4f}",
                f"{report.agreement:.4f}", f"{report.drift.relative:.3f}", f"{seconds:.1f}",
            ]
        )  # fmt: skip
        if budget == arguments.budgets[0]:
            console.rule(f"The plan at params={budget:g}")
            console.print(str(plan), highlight=False)
            console.rule("The report")
            console.print(str(report), highlight=False)
    console.rule("Accuracy on the test images, without any repair or training after the conversion")
    headings = ["model", "parameters", "accuracy", "agreement", "drift", "seconds"]
    console.print(Table(headings, rows, frozenset({"model"})).rich())


if __name__ == "__main__":
    main()
