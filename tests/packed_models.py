"""Small models for packed weights: one per kind of layer that can be packed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Convolutions(nn.Module):
    """Convolutions with a residual sum and pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.relu(self.norm2(self.conv2(x)) + x)
        return self.fc(F.relu(self.norm3(self.conv3(x))).flatten(1))


class Decoder(nn.Module):
    """Transposed convolutions, one of them grouped, with and without BatchNorm after them."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.up2 = nn.ConvTranspose2d(8, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.up3 = nn.ConvTranspose1d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.up1(x)))
        x = F.relu(self.norm2(self.up2(x)))
        return self.up3(x.flatten(2)).mean(-1)


class Grouped(nn.Module):
    """Depthwise, grouped and pointwise convolutions, whose rows begin inside of a bitmap's bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 10, 1, groups=2, bias=False),
            nn.BatchNorm2d(10),
        )
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Block(nn.Module):
    """A transformer block of its own making: attention by hand, LayerNorm, GELU."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.softmax(q @ k.transpose(-2, -1) / 4, -1) @ v)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


MODELS = {
    "conv": (Convolutions, lambda: torch.randn(6, 1, 6, 6), 5),
    "grouped": (Grouped, lambda: torch.randn(6, 3, 6, 6), 5),
    "transposed": (Decoder, lambda: torch.randn(6, 6, 3, 3), 3),
    "transformer": (Block, lambda: torch.randn(6, 4, 12), 5),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model in double precision, a batch of inputs and one of labels."""
    make, inputs, classes = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model, x = make().double(), inputs().double()
        return model, x, torch.randint(0, classes, (len(x),))
