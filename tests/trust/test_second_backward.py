"""More than one backward through one forward: multi-task losses, jacobians, gradient penalties."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.errors import FedmefError

ACTIVATIONS = [
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Softplus,
    nn.Mish,
]


def _images(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        activation(),
        nn.AvgPool2d(2),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.LayerNorm(16),
        activation(),
        nn.Linear(16, 4),
    )


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("saved", [{}, {"saved_precision": "int8"}, {"weight_storage": "packed"}])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_same_gradients_every_time(activation, saved):
    model = transform(_images(activation), Config(density=0.3, activation_sparsity=0.5, **saved))
    x = torch.randn(6, 3, 8, 8)
    loss = model(x).square().mean()
    seen = []
    for retain in (True, True, False):
        model.zero_grad()
        loss.backward(retain_graph=retain)
        seen.append(_gradients(model))
    assert seen[0]
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_a_backward_that_does_not_retain_ends_it():
    model = transform(_images(nn.ReLU), Config(density=0.3, activation_sparsity=0.5))
    loss = model(torch.randn(6, 3, 8, 8)).square().mean()
    loss.backward()
    with pytest.raises((FedmefError, RuntimeError), match=r"second (time|backward)"):
        loss.backward()


def test_a_jacobian():
    model = transform(_images(nn.ReLU), Config(density=0.3, activation_sparsity=0.5)).eval()
    x = torch.randn(2, 3, 8, 8)
    got = torch.autograd.functional.jacobian(model, x)
    assert got.shape == (2, 4, 2, 3, 8, 8)
    leaf = x.clone().requires_grad_()
    (row,) = torch.autograd.grad(model(leaf)[1, 2], leaf)
    assert torch.equal(got[1, 2], row)


def test_two_losses_share_a_trunk():
    model = transform(_images(nn.ReLU), Config(density=0.3, activation_sparsity=0.9)).eval()
    x = torch.randn(6, 3, 8, 8)
    out = model(x)
    out[:, :2].sum().backward(retain_graph=True)
    out[:, 2:].sum().backward()
    parts = _gradients(model)
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(parts, _gradients(model), rtol=1e-4, atol=1e-5)


def test_a_gradient_penalty_is_refused_and_never_lost():
    model = transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), Config(density=0.5))
    x = torch.randn(4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(FedmefError, match="gradient of a gradient"):
        F.mse_loss(gradient.norm(dim=1), torch.ones(4)).backward()
