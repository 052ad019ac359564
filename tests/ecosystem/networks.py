"""Small models that the tests put into other libraries, and what has to hold of them afterwards."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, density, freeze, masks, set_masks, transform

CONFIG = Config(density=0.4, activation_sparsity=0.5, weight_storage="dense")
PACKED = CONFIG.replace(weight_storage="packed")


def image_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Branch(nn.Module):
    """Python control flow and an opaque module: several regions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 16)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if float(h.detach().mean()) > -9:
            h = self.second(h).relu()
        return self.head(self.lstm(h[:, None])[0][:, -1])


def images(number: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 8, 8, generator=generator), torch.randint(0, 4, (number,), generator=generator)


def vectors(number: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 8, generator=generator), torch.randint(0, 4, (number,), generator=generator)


def sparse_net(config: Config = CONFIG) -> nn.Module:
    torch.manual_seed(0)
    return transform(image_net(), config)


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def train(model: Any, optimizer: Any, x: Tensor, y: Tensor, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def move_masks(model: nn.Module) -> None:
    """Another topology of the same density."""
    set_masks(model, {name: mask.flatten().roll(1).view_as(mask) for name, mask in masks(model).items()})


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in fedmef_fx.dense_state_dict(model).items()}


def check_same_state(left: nn.Module, right: nn.Module) -> None:
    expected = parameters_of(right)
    for name, value in parameters_of(left).items():
        assert torch.equal(value, expected[name]), name


def check_sparse(model: nn.Module, *inputs: Any, expected_density: float | None = None) -> None:
    """Masked weights are exactly 0, wherever one looks, and the frozen model computes what the live one computes."""
    if expected_density is not None:
        assert abs(density(model) - expected_density) < 0.02
    values = parameters_of(model)
    for name, mask in masks(model).items():
        assert torch.count_nonzero(values[name][~mask.to(values[name].device)]) == 0, name
        assert torch.isfinite(values[name]).all(), name
    if inputs:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(freeze(model)(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
        model.train(was_training)
