"""A small residual network and its inputs, for the tests of the main job."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions with batch norm and a shortcut."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class SmallNet(nn.Module):
    """A stem, two residual blocks, a strided convolution, a classifier: everything common in 15 k parameters."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.down(self.blocks(F.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Untraceable(SmallNet):
    """The same computation with control flow that depends on data, which fx cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e30:
            raise ValueError("too bright")
        return super().forward(x)


def small_net(cls: type[SmallNet] = SmallNet, seed: int = 0, dtype: torch.dtype = torch.float32) -> SmallNet:
    """A SmallNet with batch-norm statistics from some random images, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls()
        for _ in range(3):
            model.train()(torch.randn(8, 3, 12, 12))
    return model.eval().to(dtype)


def images(count: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
