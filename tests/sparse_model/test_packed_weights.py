"""Packed weights train as dense ones do: step for step, through topology changes, in a fraction of the memory."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from fedmef_fx import Extrusion, density, growth_candidates, masks, set_masks
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.clipping import clip_gradients
from tests.dense_and_packed import (
    CONFIG,
    OPTIMIZERS,
    OVER_STEPS,
    TIGHT,
    assert_same_weights,
    change_topology,
    dense_and_packed,
    relative,
    step,
)
from tests.packed_models import MODELS


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_dense_training_step_for_step(name: str, optimizer: str, normalization: str) -> None:
    dense, packed, x, y = dense_and_packed(name, CONFIG.replace(normalization=normalization))
    optimizers = [OPTIMIZERS[optimizer](model) for model in (dense, packed)]
    for number in range(24):
        if number in (8, 16):
            change_topology(dense, packed, x, y, uneven=number == 16)
        losses = [step(model, opt, x, y) for model, opt in zip((dense, packed), optimizers, strict=True)]
        assert float((losses[0] - losses[1]).abs() / losses[0]) < OVER_STEPS[optimizer]
    assert_same_weights(dense, packed, tolerance=10 * OVER_STEPS[optimizer])


@pytest.mark.parametrize("statistics", ["active", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_autograd_of_the_equations(name: str, statistics: str) -> None:
    """With nothing dropped, both storages give what autograd gives for the kernel written out in torch functions."""
    dense, packed, x, y = dense_and_packed(name, CONFIG.replace(nsconv_statistics=statistics, activation_sparsity=0.0))
    eager = _written_out(dense)
    for model in (dense, packed):
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(eager(x), y).backward()
    expected = dict(eager.named_parameters())
    for model in (dense, packed):
        parameters = masked_parameters(model)
        for parameter_name, parameter in model.named_parameters():
            masked = parameters.get(parameter_name)
            got = parameter.grad if masked is None or parameter.grad is None else masked.expand(parameter.grad)
            if got is not None:
                assert relative(got, expected[parameter_name].grad) < TIGHT, parameter_name


def _written_out(model: nn.Module) -> nn.Module:
    """A copy of a dense-storage model whose kernels are plain torch functions that autograd looks into."""
    eager = copy.deepcopy(model)
    for node in eager.graph.nodes:
        if node.target is nsconv_weight:
            node.target = _kernel
        elif node.target is masked_weight:
            node.target = torch.mul
    eager.recompile()
    return eager


def _kernel(weight, gain, mask, *, g, groups, transposed, statistics):
    """w_hat of `ops/nsconv.py` for rows with a spread, without its guards but the one for a single weight."""
    rows = weight
    keep = mask.double()
    if transposed:
        shape = (groups, weight.shape[0] // groups, weight.shape[1], -1)
        rows, keep = (t.reshape(shape).transpose(1, 2).flatten(0, 1) for t in (weight, keep))
    rows, keep = rows.flatten(1), keep.flatten(1)
    number = keep.sum(1, keepdim=True)
    counted = torch.full_like(number, rows.shape[1]) if statistics == "all" else number.clamp_min(1)
    mean = torch.where(number > 1, (rows * keep).sum(1, keepdim=True) / counted, 0.0)
    base = (rows * keep - mean) * keep
    square = base.square().sum(1, keepdim=True)
    if statistics == "all":
        square = square + (rows.shape[1] - number) * mean.square()
    kernel = g * gain.unsqueeze(1) * base / square.clamp_min(1e-6).sqrt()
    if not transposed:
        return kernel.reshape(weight.shape)
    inner = kernel.reshape(groups, weight.shape[1], weight.shape[0] // groups, -1)
    return inner.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("name", MODELS)
def test_pruned_activations_are_the_same(name: str) -> None:
    dense, packed, x, y = dense_and_packed(name, CONFIG.replace(activation_sparsity=0.7))
    optimizers = [SGD(model.parameters(), lr=0.02, momentum=0.9) for model in (dense, packed)]
    for _ in range(10):
        losses = [step(model, opt, x, y) for model, opt in zip((dense, packed), optimizers, strict=True)]
    assert float((losses[0] - losses[1]).abs() / losses[0]) < TIGHT
    assert_same_weights(dense, packed)


@pytest.mark.parametrize("name", MODELS)
def test_growth_candidates_are_the_same(name: str) -> None:
    dense, packed, x, y = dense_and_packed(name)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    for batches in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]):
        theirs, ours = (growth_candidates(model, loss_fn, batches, k=5) for model in (dense, packed))
        for key, candidates in theirs.items():
            assert torch.equal(ours[key].positions, candidates.positions)
            assert relative(ours[key].values, candidates.values) < TIGHT
            assert not masks(packed)[key].flatten()[ours[key].positions].any()
    assert all(parameter.grad is None for parameter in packed.parameters())


def test_extrusion_marks_and_moves_the_same_weights() -> None:
    dense, packed, x, y = dense_and_packed("conv")
    results = []
    for model in (dense, packed):
        optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
        with Extrusion(model, optimizer, budget_steps=6, strength=0.05) as extrusion:
            for _ in range(6):
                step(model, optimizer, x, y)
        results.append((extrusion.marked, extrusion.norm(), extrusion.learning_rate))
    for name, positions in results[0][0].items():
        assert torch.equal(positions, results[1][0][name])
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-6)  # the norm is taken in single precision
    assert_same_weights(dense, packed)


@pytest.mark.parametrize("name", MODELS)
def test_adaptive_clipping_is_the_same(name: str) -> None:
    dense, packed, x, y = dense_and_packed(name)
    counts = []
    for model in (dense, packed):
        F.cross_entropy(model(x), y).backward()
        counts.append(clip_gradients(model, 0.01))
    assert counts[0] == counts[1] > 0
    for key, parameter in masked_parameters(packed).items():
        assert (
            relative(parameter.expand(parameter.parameter.grad), masked_parameters(dense)[key].parameter.grad) < TIGHT
        )


def test_gradients_accumulate_and_are_clipped_by_norm() -> None:
    dense, packed, x, y = dense_and_packed("grouped")
    norms = []
    for model in (dense, packed):
        for part in (slice(0, 2), slice(2, 6)):
            F.cross_entropy(model(x[part]), y[part]).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
    assert norms[0] == pytest.approx(norms[1], rel=TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(dtype: torch.dtype) -> None:
    dense, packed, x, y = dense_and_packed("conv")
    grads = []
    for model in (dense.float(), packed.float()):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        optimizer = SGD(model.parameters(), lr=0.01)
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        parameters = masked_parameters(model)
        grads.append({key: parameter.expand(parameter.parameter.grad) for key, parameter in parameters.items()})
        scaler.step(optimizer)
    assert all(gradient.dtype == torch.float32 for gradient in grads[1].values())
    # The kernels agree to single precision; rounded to 16 bits a few of them land on neighbouring numbers.
    assert all(relative(grads[1][key], gradient) < 2e-2 for key, gradient in grads[0].items())


@pytest.mark.parametrize("kind", ["weight", "gain"])
def test_frozen_weights_and_gains(kind: str) -> None:
    dense, packed, x, y = dense_and_packed("conv", CONFIG.replace(activation_sparsity=0.5))
    for model in (dense, packed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(("norm" in name) == (kind == "weight"))
        F.cross_entropy(model(x), y).backward()
    for name, parameter in packed.named_parameters():
        expected = dense.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None) == (not parameter.requires_grad)
        if "norm" in name and expected is not None:
            assert relative(parameter.grad, expected) < TIGHT
            assert parameter.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_training_on_cuda_equals_dense_training(name: str) -> None:
    dense, packed, x, y = dense_and_packed(name)
    x, y = x.cuda(), y.cuda()
    models = [dense.cuda(), packed.cuda()]
    optimizers = [OPTIMIZERS["sgd"](model) for model in models]
    for number in range(6):
        if number == 3:
            for model in models:
                set_masks(model, {key: mask.roll(1) for key, mask in masks(model).items()})
        losses = [step(model, opt, x, y) for model, opt in zip(models, optimizers, strict=True)]
    assert float((losses[0] - losses[1]).abs()) < 1e-10  # sums on the device have no fixed order
    assert_same_weights(dense, packed, tolerance=1e-9)


def test_half_precision_models_run() -> None:
    _, packed, x, _ = dense_and_packed("grouped")
    expected = packed.eval()(x)
    assert torch.allclose(packed.bfloat16()(x.bfloat16()).double(), expected, atol=0.1)


def test_copies_are_independent_and_equal() -> None:
    _, packed, x, y = dense_and_packed("conv")
    counterpart = copy.deepcopy(packed)
    assert torch.equal(counterpart(x), packed(x))
    set_masks(counterpart, {name: ~mask for name, mask in masks(counterpart).items()})
    step(counterpart, SGD(counterpart.parameters(), lr=0.1), x, y)
    assert density(counterpart) == pytest.approx(1 - density(packed), abs=0.01)
    assert packed(x).shape == counterpart(x).shape
