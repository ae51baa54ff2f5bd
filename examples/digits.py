"""The data and the network that the examples share: scikit-learn's digits and a small residual network."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

TRAINED = Path(__file__).with_name("digits.safetensors")


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def small_resnet(seed: int) -> nn.Module:
    """A residual network with 14 convolutions for images [N, 1, 8, 8]."""
    torch.manual_seed(seed)
    widths = [(32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1)]
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *(Block(*width) for width in widths), *head)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: float [N, 1, 8, 8] in -1..1 and int64 [N]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    split = train_test_split(images, torch.tensor(data.target), test_size=500, random_state=0, stratify=data.target)
    train_x, test_x, train_y, test_y = split
    return train_x, train_y, test_x, test_y


def trained() -> nn.Module:
    """The network of digits.safetensors, which train_digits.py makes."""
    model = small_resnet(seed=0)
    model.load_state_dict(load_file(TRAINED))
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that are told right."""
    with torch.inference_mode():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> Iterator[float]:
    """Train with Adam and a cosine schedule on shifted copies of the images; yields each epoch's mean loss."""
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        model.train()
        losses = []
        for index in torch.randperm(len(images)).split(64)[: len(images) // 64]:
            shift = tuple(torch.randint(-1, 2, (2,)).tolist())
            loss = F.cross_entropy(model(images[index].roll(shift, (2, 3))), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield sum(losses) / len(losses)
    model.eval()
