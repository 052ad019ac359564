"""A model with methods and blocks, for what users do after `transform`."""

import torch
from torch import Tensor, nn

from fedmef_fx import Config

CONFIGS = {
    "dense": Config(density=0.3, activation_sparsity=0.5, weight_storage="dense"),
    "packed": Config(density=0.3, activation_sparsity=0.5, weight_storage="packed"),
    "keep": Config(density=0.3, activation_sparsity=0, normalization="keep", weight_storage="dense"),
}
X = torch.linspace(-2, 2, 4 * 3 * 64).reshape(4, 3, 8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x)) + x).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Linear(8, classes) if classes else nn.Identity()
