"""Hand-made models, each small enough that its graph text is read at a glance."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HOSTILE_NAMES = [
    'quote"quote',
    "new\nline",
    "<script>alert(1)</script>",
    "back\\slash",
    "\x1b[31mred",
    "separator\u2028",
    "übergröße-重み",
    "x" * 10_000,
]


def named(*layers: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def linear() -> nn.Module:
    return named(("fc", nn.Linear(4, 2)), ("relu", nn.ReLU()))


def two_convolutions() -> nn.Module:
    return named(
        ("conv1", nn.Conv2d(1, 8, 3, bias=False)),
        ("bn1", nn.BatchNorm2d(8)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(8, 4, 3)),
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


class PerMode(nn.Module):
    """Its train and eval mode run different operations."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), p=0.5, training=self.training)


class Tied(nn.Module):
    """One parameter, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.fc(x)), self.fc.weight)


class Branches(nn.Module):
    """Values that are tuples, slices, and an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 4))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        left, right = (x @ self.weight).chunk(2, dim=-1)
        return left if scale is None else left[:, 1:] * scale + right[..., 1:].to(torch.float32)


def hostile() -> nn.Module:
    return named(*((name, nn.Linear(2, 2)) for name in HOSTILE_NAMES))
