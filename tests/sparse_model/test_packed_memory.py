"""Packed weights take a fraction of the memory, and leave none of it behind."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from fedmef_fx import Config, masks, memory, report, set_masks, transform
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.packing.registry import held_buffers
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.dense_and_packed import CONFIG, change_topology, dense_and_packed, step
from tests.packed_models import build


def test_memory_of_weights_gradients_and_peak() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    x = torch.randn(2, 512)
    dense, packed = (transform(model, Config(density=0.1, weight_storage=s)) for s in ("dense", "packed"))
    assert report(packed)["pack-weights"].refusals == ()
    theirs, ours = memory(dense, (x,)), memory(packed, (x,))
    one = 512 * 512 * 4
    assert ours.weights < 0.11 * theirs.weights
    assert ours.gradients < 0.11 * theirs.gradients
    assert ours.buffers < 0.13 * theirs.buffers
    # Above all that stays there is one dense tensor at a time, the active values in some copies, and a block of
    # temporaries of the kernels.
    assert ours.peak - ours.weights - ours.gradients - ours.buffers < 1.6 * one


def test_a_convolution_never_holds_more_than_its_weight_and_its_gradient() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    packed = transform(model, Config(density=0.1, weight_storage="packed"))
    x = torch.randn(1, 64, 4, 4)
    with LiveBytes(packed, x) as live:
        before = live.current
        packed(x).sum().backward()
    assert live.peak - before < 2.6 * 64 * 64 * 9 * 4


class Broken(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("broken")


def _fail_in_forward(model: nn.Module, x: Tensor) -> None:
    model(x[:, :, :3])  # too small for the last convolution


def _fail_before_backward(model: nn.Module, x: Tensor) -> None:
    Broken.apply(model(x)).sum().backward()


def _fail_after_backward(model: nn.Module, x: Tensor) -> None:
    model(Broken.apply(x.requires_grad_())).sum().backward()


@pytest.mark.parametrize("fail", [_fail_in_forward, _fail_before_backward, _fail_after_backward])
def test_exceptions_leave_no_packed_buffers_alive(fail) -> None:
    gc.collect()
    before = set(held_buffers())
    model, x, _ = build("conv")
    packed = transform(model, CONFIG.replace(activation_sparsity=0.5, weight_storage="packed"))
    with pytest.raises(RuntimeError):
        fail(packed, x)
    gc.collect()
    assert set(held_buffers()) <= before


def test_hundreds_of_steps_leak_nothing() -> None:
    _, packed, x, y = dense_and_packed("grouped", CONFIG.replace(activation_sparsity=0.5))
    optimizer = SGD(packed.parameters(), lr=0.01, momentum=0.9)
    counts = []
    for number in range(210):
        step(packed, optimizer, x, y)
        if number % 35 == 0:
            change_topology(packed, packed, x, y, uneven=False)
            optimizer.zero_grad()
        if number % 70 == 69:
            gc.collect()
            counts.append((len(held_buffers()), sum(issubclass(type(o), Tensor) for o in gc.get_objects())))
    assert counts[1] == counts[2]


def test_a_model_can_be_freed() -> None:
    _, packed, x, y = dense_and_packed("grouped")
    step(packed, SGD(packed.parameters(), lr=0.01), x, y)
    set_masks(packed, {name: ~mask for name, mask in masks(packed).items()})
    reference = weakref.ref(masked_parameters(packed)["head.weight"].parameter)
    del packed
    gc.collect()
    assert reference() is None
