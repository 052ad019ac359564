"""Extrusion with optimizers that libraries put something around."""

import pytest
import torch
from torch import nn

from fedmef_fx import Config, Extrusion, transform
from fedmef_fx.errors import ConfigError


class _Subclass(torch.optim.Optimizer):
    """A wrapper that is an optimizer by class but never called its constructor."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self):
        self.optimizer.step()


class _Plain:
    """A wrapper of no particular class."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


class _Base:
    """A wrapper that keeps what it wraps under another name, as sharpness-aware ones do."""

    def __init__(self, optimizer):
        self.base_optimizer = optimizer

    def step(self):
        self.base_optimizer.step()


def _model():
    torch.manual_seed(0)
    return transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), Config(density=0.5))


def _train(model, optimizer, steps=3):
    torch.manual_seed(1)
    with Extrusion(model, optimizer, budget_steps=steps) as extrusion:
        for _ in range(steps):
            model.zero_grad()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
    return extrusion


@pytest.mark.parametrize("wrap", [_Subclass, _Plain, _Base, lambda o: _Plain(_Subclass(o))])
def test_a_wrapper_is_taken_off(wrap):
    bare, wrapped = _model(), _model()
    expected = _train(bare, torch.optim.SGD(bare.parameters(), lr=0.05))
    got = _train(wrapped, wrap(torch.optim.SGD(wrapped.parameters(), lr=0.05)))
    assert got.step == expected.step == 3
    assert got.learning_rate == expected.learning_rate
    for a, b in zip(bare.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [None, [], "sgd", _Plain(None)])
def test_what_holds_no_optimizer_is_refused(optimizer):
    with pytest.raises(ConfigError, match=r"Extrusion: optimizer: got .*expected one optimizer"):
        Extrusion(_model(), optimizer, budget_steps=3)


def test_several_optimizers_get_one_extrusion_each():
    model = _model()
    with pytest.raises(ConfigError, match="one Extrusion for each optimizer"):
        Extrusion(model, [torch.optim.SGD(model.parameters(), lr=0.1)], budget_steps=3)
