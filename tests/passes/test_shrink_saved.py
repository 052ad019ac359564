"""Saved tensors are shrunk in place only where nobody can see it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx import Config, inspect, report, transform
from fedmef_fx.measure.live import LiveBytes

KEEP = Config(density=1.0, normalization="keep", activation_sparsity=0.5)


class AddsInPlace(nn.Module):
    """`u += x` where another name holds u's storage too, read after the sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        seen = self.first(x)
        total = seen
        total += x
        return self.second(torch.relu(total)) + seen


class Chain(nn.Module):
    """A convolution, a ReLU read by one layer only, and another layer."""

    def __init__(self, activation):
        super().__init__()
        self.first, self.second, self.activation = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), activation

    def forward(self, x):
        return self.second(self.activation(self.first(x)))


class Fork(Chain):
    """A ReLU whose gradient is the sum of two."""

    def forward(self, x):
        y = self.activation(self.first(x))
        return self.second(y).sum() + y.square().sum()


@pytest.mark.parametrize("given", [False, True], ids=["model alone", "with example inputs"])
def test_a_tensor_that_is_added_to_in_place_shows_the_sum_to_its_other_readers(given):
    model, x = AddsInPlace(), torch.randn(2, 3, 6, 6)
    sparse = transform(model, KEEP, example_inputs=(x,) if given else None)
    assert torch.equal(sparse(x), model(x))
    assert "inplace=True" not in str(inspect(sparse))


def test_a_residual_sum_that_others_read_is_not_rescaled_behind_their_back():
    model = nn.Sequential(AddsInPlace())
    model[0].first = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
    sparse = transform(model, Config(density=0.5))
    assert any("others read" in refusal.reason for result in report(sparse) for refusal in result.refusals)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1)], ids=lambda a: type(a).__name__)
def test_gradients_in_place_are_bit_identical(activation):
    model, x = Chain(activation), torch.randn(4, 3, 9, 9)
    # gamma so small that nothing is dropped
    sparse = transform(model, KEEP.replace(activation_sparsity=1e-6))
    assert "inplace_gradient=True" in str(inspect(sparse))
    out = copy.deepcopy(sparse)
    for node in (n for n in out.graph.nodes if n.kwargs.get("inplace_gradient")):
        node.kwargs = {**node.kwargs, "inplace_gradient": False, "inplace": False}
    out.recompile()
    for net in (sparse, out):
        net(x).square().sum().backward()
    pairs = list(zip(sparse.parameters(), out.parameters(), strict=True))
    assert pairs
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_gradient_that_others_may_hold_is_not_written_to():
    sparse = transform(Fork(nn.ReLU()), KEEP)
    assert "inplace_gradient" not in str(inspect(sparse))


def test_in_place_backward_saves_an_activation_at_the_peak():
    x = torch.randn(8, 3, 34, 34, requires_grad=True)
    sparse = transform(Chain(nn.ReLU()), KEEP)
    out = copy.deepcopy(sparse)
    for node in (n for n in out.graph.nodes if n.kwargs.get("inplace_gradient")):
        node.kwargs = {**node.kwargs, "inplace_gradient": False}
    out.recompile()
    y = F.conv2d(torch.randn(1, 8, 32, 32), torch.randn(4, 8, 3, 3))  # threads and caches of torch are warm
    peaks = []
    for net in (sparse, out):
        with LiveBytes(net, x, y) as live:
            net(x).sum().backward()
        peaks.append(live.peak)
        del live
    assert peaks[0] < peaks[1]
