"""Convert a network for images and bring it back with unlabelled images of your own.

    python examples/finetune_images.py FOLDER --model resnet18 --params 0.5 --out resnet18.safetensors

FOLDER holds images, in sub-folders or not; labels are neither needed nor read. `--weights` names a checkpoint of the
torchvision model; without it the ones that torchvision publishes are downloaded. With `--torchvision FashionMNIST` or
another data set of torchvision, FOLDER is where that is kept. Needs torchvision (`pip install torchvision`).
"""

import argparse
from pathlib import Path

import torch
import torchvision
from rich.console import Console
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

import convsplit

KINDS = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


class Images(Dataset):
    """All images below a folder."""

    def __init__(self, folder: Path, transform: v2.Transform) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
        self.transform = transform
        if not self.files:
            raise SystemExit(f"no images ({', '.join(sorted(KINDS))}) below {folder}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(torchvision.io.decode_image(str(self.files[index]), mode="RGB"))


class WithoutLabels(Dataset):
    """The images of a labelled data set."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index][0]


def images_in(arguments: argparse.Namespace) -> Dataset:
    steps = [
        v2.ToImage(), v2.Resize(arguments.size), v2.CenterCrop(arguments.size), v2.ToDtype(torch.float32, scale=True),
        v2.Lambda(lambda image: image.expand(3, -1, -1)),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]  # fmt: skip
    if arguments.torchvision:
        dataset = getattr(torchvision.datasets, arguments.torchvision)
        return WithoutLabels(dataset(arguments.folder, download=True, transform=v2.Compose(steps)))
    return Images(arguments.folder, v2.Compose(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="resnet18", help="a name that torchvision.models.get_model knows")
    parser.add_argument("--weights", type=Path, help="a state_dict; torchvision's own if not given")
    parser.add_argument("--torchvision", default="", help="a data set of torchvision instead of files")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--params", type=float, default=0.5)
    parser.add_argument("--calibration", type=int, default=256, help="images for the closed-form repair")
    parser.add_argument("--minutes", type=float, default=10, help="of distillation")
    parser.add_argument("--out", type=Path, default=Path("converted.safetensors"))
    arguments = parser.parse_args()
    console = Console()

    model = torchvision.models.get_model(arguments.model, weights=None if arguments.weights else "DEFAULT")
    if arguments.weights:
        model.load_state_dict(torch.load(arguments.weights, weights_only=True))
    model.eval()
    data = images_in(arguments)
    few = Subset(data, torch.randperm(len(data))[: arguments.calibration].tolist())
    batches = list(DataLoader(few, batch_size=32))

    budget = convsplit.Budget(params=arguments.params)
    converted = convsplit.convert(model, batches[0][:1], budget=budget, calibration=batches, progress=True)
    console.print(str(convsplit.compare(converted, model, batches[0])), highlight=False)
    if arguments.minutes:
        loader = DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
        course = convsplit.distill(
            converted, model, loader, epochs=1000, seconds=60 * arguments.minutes, held_out=batches[:4],
            augment=lambda images: images.flip(3) if torch.rand(()) < 0.5 else images, progress=True,
        )  # fmt: skip
        console.print(f"distilled: loss {course.before.loss:.3g} -> {course.best.loss:.3g}")
        console.print(str(convsplit.compare(converted, model, batches[0])), highlight=False)
    convsplit.save(converted, arguments.out)
    console.print(f"saved to {arguments.out}; back with convsplit.load({str(arguments.out)!r}, model)")


if __name__ == "__main__":
    main()
