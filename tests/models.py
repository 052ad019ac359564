"""Small models that graph passes find hard; each is a function so that tests get fresh ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A residual block with a projection, as in ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        out = F.relu(out)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))


class Depthwise(nn.Module):
    """Inverted residuals: depthwise and grouped convolutions, ReLU6, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(inplace=True),
            nn.Conv2d(12, 3, 1, bias=False),
            nn.BatchNorm2d(3),
        )
        self.grouped = nn.Conv2d(3, 6, 3, groups=3)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        return self.head(self.drop(F.leaky_relu(self.grouped(x), 0.1).mean((2, 3))))


class ModeDependent(nn.Module):
    """Functional dropout and an auxiliary head that exists in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.aux = nn.Linear(16, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.dropout(F.gelu(self.body(x)), 0.4, training=self.training)
        if self.training:
            return self.head(x), self.aux(x)
        return self.head(x)


class DropPath(nn.Module):
    """Stochastic depth and a BatchNorm class with its own activation, computed functionally."""

    class NormAct(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.num_batches_tracked.add_(1)
            out = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
            )
            return F.silu(out)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = DropPath.NormAct(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.training:
            keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(0.5)
            out = out * keep / 0.5
        return self.head((x + out).mean((2, 3)))


class Tied(nn.Module):
    """One weight in two layers, and a weight that is used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.by_hand = nn.Parameter(torch.randn(6, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x)))) @ self.by_hand


class Shared(nn.Module):
    """One module that is called twice, max and average pooling, transposed convolution, circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 4, 2, stride=2)
        self.up_norm = nn.BatchNorm2d(4, affine=False)
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.norm(self.conv(x)).relu()
        x = F.relu(self.up_norm(self.up(self.pool(x))))
        return self.average(x).flatten(1)


class PreActivation(nn.Module):
    """BatchNorm before the convolution, a squeeze-and-excitation gate, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv(F.relu(self.norm(x))))
        out = out * torch.sigmoid(self.gate(out.mean((2, 3), keepdim=True)))
        return self.head(torch.cat([x, out], 1).amax((2, 3)))


class Optional(nn.Module):
    """An optional argument that changes the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        out = self.layer(x)
        if scale is not None:
            out = out * scale
        return {"out": out, "norm": out.norm(dim=-1)}


def _image() -> tuple[Tensor, ...]:
    return (torch.randn(4, 3, 8, 8),)


def _rows() -> tuple[Tensor, ...]:
    return (torch.randn(4, 6),)


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "residual": (Residual, _image),
    "depthwise": (Depthwise, _image),
    "mode_dependent": (ModeDependent, _rows),
    "drop_path": (DropPath, _image),
    "tied": (Tied, _rows),
    "shared": (Shared, _image),
    "pre_activation": (PreActivation, _image),
    "optional": (Optional, _rows),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.ELU(), nn.Conv1d(4, 4, 2)),
        lambda: (torch.randn(4, 3, 9),),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Hardswish(), nn.MaxPool3d(2), nn.Flatten()),
        lambda: (torch.randn(4, 2, 6, 6, 6),),
    ),
    "linear_norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
        _rows,
    ),
}


def build(name: str, *, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model of the zoo with BatchNorm statistics that hide nothing, and inputs for it."""
    make, inputs = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
                if module.affine:
                    module.weight.data.uniform_(0.5, 1.5)
                    module.bias.data.normal_()
        return model, inputs()
