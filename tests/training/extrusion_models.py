"""Masked models, small enough to compute their extrusion by hand."""

import torch
from torch import Tensor, nn

from fedmef_fx.config import Config
from fedmef_fx.sparse_model.parameters import register_mask
from fedmef_fx.sparse_model.transformation import CHILD_NAME, PrunableParameter, Transformation
from fedmef_fx.training.extrusion import Extrusion

NAMES = ("a.weight", "b.weight")


class Masked(nn.Linear):
    """A linear layer whose weight gets no gradient where its mask is off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.where(self.weight_mask, self.weight, 0.0), self.bias)


def make_model(*, masked: bool = True, density: float = 0.5, **config: object) -> nn.Module:
    """Two masked layers, 4 -> 5 -> 3, as a transformation would leave them."""
    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("a", Masked(4, 5))
    model.add_module("b", Masked(5, 3))
    transformation = Transformation(Config(density=density, **config))
    for name in NAMES:
        weight = model.get_parameter(name)
        transformation.prunable[name] = PrunableParameter(name, weight.numel(), "graph", masked=masked)
        mask = torch.rand(weight.shape) < density if masked else torch.ones(weight.shape, dtype=torch.bool)
        register_mask(model, name, mask)
    model.add_module(CHILD_NAME, transformation)
    return model


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model.b(model.a(x).relu())


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return run(model, x).square().mean()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, x).backward()
    return {name: model.get_parameter(name).grad.clone() for name in NAMES}


X = torch.linspace(-1, 1, 24).reshape(6, 4)


def rates_used(optimizer, extrusion: Extrusion, model: nn.Module, scheduled: list[float]) -> list[float]:
    """The learning rate of each step under a schedule, checking that the schedule itself is left alone."""
    used: list[float] = []
    handle = optimizer.register_step_pre_hook(lambda o, *_: used.append(float(o.param_groups[0]["lr"])))
    for rate in scheduled:
        optimizer.param_groups[0]["lr"] = rate
        gradients(model, X)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
        assert extrusion.learning_rate == used[-1]
    handle.remove()
    return used
