"""Normalisations that keep 8 bits: forward and running statistics exact, gradients those of what was kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.ops.norms import compressed_batch_norm, compressed_batch_norm_module, compressed_norm
from fedmef_fx.packing import BlockwiseTensor

NORMS = {
    "layer_norm": (
        {"shape": (8, 6), "eps": 1e-5},
        lambda x, w, b: F.layer_norm(x, (8, 6), w.view(8, 1).expand(8, 6), b.view(8, 1).expand(8, 6)),
    ),
    "group_norm": ({"groups": 4, "eps": 1e-3}, lambda x, w, b: F.group_norm(x, 4, w, b, 1e-3)),
    "instance_norm": ({"eps": 1e-5}, lambda x, w, b: F.instance_norm(x, None, None, w, b)),
    "rms_norm": ({"shape": (6,), "eps": None}, lambda x, w, _: F.rms_norm(x, (6,), w[:6])),
}


def arguments(name, dtype):
    x = (torch.randn(10, 8, 6) * 2 + 1).to(dtype).requires_grad_()
    weight, bias = torch.rand(8).to(dtype).requires_grad_(), torch.randn(8).to(dtype).requires_grad_()
    return x, weight, bias


def run(name, x, kept, weight, bias):
    options = NORMS[name][0]
    if name == "layer_norm":
        weight, bias = weight.view(8, 1).expand(8, 6), bias.view(8, 1).expand(8, 6)
    if name == "rms_norm":
        weight, bias = weight[:6], None
    return compressed_norm(x, kept, weight, bias, function=name, **options)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compressed", [True, False])
def test_forward_is_torchs_and_gradients_are_those_at_what_was_kept(name, dtype, compressed):
    x, weight, bias = arguments(name, dtype)
    kept = BlockwiseTensor.encode(x.detach()) if compressed else None
    got = run(name, x, kept, weight, bias)
    assert torch.equal(got, NORMS[name][1](x, weight, bias))
    at = x if kept is None else kept.unpack().requires_grad_()
    expected = NORMS[name][1](at, weight, bias)
    direction = torch.randn(got.shape).to(dtype)
    wanted = (at, weight) if name == "rms_norm" else (at, weight, bias)
    for want, have in zip(
        torch.autograd.grad(expected, wanted, direction),
        torch.autograd.grad(got, (x, *wanted[1:]), direction),
        strict=True,
    ):
        assert torch.equal(want, have)


@pytest.mark.parametrize("name", NORMS)
def test_without_a_codec_gradients_check(name):
    x, weight, bias = arguments(name, torch.float64)
    inputs = (x[:2].detach().requires_grad_(), weight, bias)
    assert torch.autograd.gradcheck(lambda x, w, b: run(name, x, None, w, b), inputs)


def test_layer_norm_keeps_8_bits_and_no_statistics():
    layer = nn.LayerNorm(64)
    x = torch.randn(32, 64, requires_grad=True)
    with SavedTensors(layer, x) as saved:
        kept = BlockwiseTensor.encode(x.detach())
        out = compressed_norm(x, kept, layer.weight, layer.bias, function="layer_norm", shape=(64,), eps=1e-5)
    assert saved.by_kind() == {"dense": 0, "packed values": 0, "bitmap": 0, "8-bit": 2048 + 8 * 8}
    del kept
    out.sum().backward()
    assert saved.nbytes == 0


BATCH_NORMS = {
    "plain": lambda: nn.BatchNorm2d(5),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "not affine": lambda: nn.BatchNorm2d(5, affine=False),
    "untracked": lambda: nn.BatchNorm2d(5, track_running_stats=False),
}


@pytest.mark.parametrize("kind", BATCH_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_norm_follows_its_module_in_every_mode(kind, dtype):
    module = BATCH_NORMS[kind]().to(dtype)
    if module.running_var is not None:
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    counterpart = copy.deepcopy(module)
    for training in (True, True, False, True):
        module.train(training)
        counterpart.train(training)
        x = (torch.randn(6, 5, 9, 9, dtype=dtype) * 3 + 1).requires_grad_()
        kept = BlockwiseTensor.encode(x.detach())
        got = compressed_batch_norm_module(x, kept, module)
        decoded = kept.unpack().requires_grad_()
        reference = copy.deepcopy(counterpart)
        at_kept = reference(decoded)
        assert torch.equal(got, counterpart(x))
        assert all(torch.equal(value, counterpart.state_dict()[name]) for name, value in module.state_dict().items())
        direction = torch.randn_like(got)
        wanted = torch.autograd.grad(at_kept, [decoded, *reference.parameters()], direction)
        for want, have in zip(wanted, torch.autograd.grad(got, [x, *module.parameters()], direction), strict=True):
            # In float32 a mean of the same numbers; the kernels' order differs with the layout at most.
            assert torch.allclose(want, have, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_a_codec_checks(training):
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        statistics = (mean.clone(), var.clone())
        return compressed_batch_norm(x, None, *statistics, weight, bias, training=training)

    assert torch.autograd.gradcheck(function, (x, weight, bias))


def test_running_statistics_that_change_before_backward_are_noticed():
    module = nn.BatchNorm1d(4).eval()
    x = torch.randn(8, 4, requires_grad=True)
    out = compressed_batch_norm_module(x, BlockwiseTensor.encode(x.detach()), module)
    module.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_wrong_number_of_dimensions_is_the_modules_error():
    with pytest.raises(ValueError, match="expected 4D input"):
        compressed_batch_norm_module(torch.randn(3, 4), None, nn.BatchNorm2d(4))
