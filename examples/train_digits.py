"""Train the network that the examples start from, and write it to digits.safetensors.

python examples/train_digits.py          # half a minute on two cores; needs nothing but scikit-learn's data
"""

import argparse
from pathlib import Path

from digits import TRAINED, accuracy, digits, small_resnet, train
from rich.progress import track
from safetensors.torch import save_file
from torch import nn

EPOCHS = 12


def trained_anew(epochs: int = EPOCHS) -> nn.Module:
    """From the same random weights every time; machines round differently, so not to the same trained ones."""
    images, labels, _, _ = digits()
    model = small_resnet(seed=0)
    for _ in track(train(model, images, labels, epochs), "Training", total=epochs):
        pass
    return model


def write(model: nn.Module, path: Path) -> None:
    """Keep the weights in half precision: half the size, and the network answers the same."""
    state = model.state_dict()
    save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=TRAINED)
    arguments = parser.parse_args()
    model = trained_anew(arguments.epochs)
    write(model, arguments.out)
    _, _, images, labels = digits()
    print(f"{accuracy(model, images, labels):.1%} of {len(images)} test images right; written to {arguments.out}")


if __name__ == "__main__":
    main()
