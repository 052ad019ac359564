"""`transform` as its users meet it: parity, masks that hold whatever happens to the model, and bad input."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, transform
from fedmef_fx.ops.gain import activation_gain
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.models import ZOO, Optional, Residual, build
from tests.transform_checks import (
    IDENTITY,
    OPTIMIZERS,
    SPARSE,
    assert_masked_weights_are_zero,
    loss_of,
    outputs,
    seeded,
)


@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_identity_configuration_is_bitwise_the_original(name, examples):
    model, inputs = build(name)
    counterpart = transform(model, IDENTITY, example_inputs=inputs if examples else None)
    unseen = tuple(torch.randn_like(x) * 3 for x in inputs)
    for training in (False, True):
        for given in (inputs, unseen):
            expected = seeded(model, given, training=training)
            got = seeded(counterpart, given, training=training)
            assert len(expected) == len(got)
            for left, right in zip(expected, got, strict=True):
                assert torch.equal(left, right)
            model.zero_grad()
            counterpart.zero_grad()
            sum(t.square().mean() for t in expected).backward()
            sum(t.square().mean() for t in got).backward()
            for key, parameter in model.named_parameters():
                got_grad = counterpart.get_parameter(key).grad
                assert (parameter.grad is None) == (got_grad is None), key
                assert parameter.grad is None or torch.equal(parameter.grad, got_grad), key
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, counterpart.get_buffer(key)), key


@pytest.mark.parametrize("name", ZOO)
def test_the_callers_model_is_untouched(name):
    model, inputs = build(name)
    before = copy.deepcopy(model.state_dict())
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
    kinds = {path: type(module) for path, module in model.named_modules()}
    sparse = transform(model, SPARSE, example_inputs=inputs)
    loss_of(sparse(*inputs)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert attributes == {path: sorted(vars(module)) for path, module in model.named_modules()}
    assert kinds == {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ZOO)
def test_masked_weights_stay_zero_under_any_optimizer(name, optimizer):
    model, inputs = build(name)
    sparse = transform(model, SPARSE)
    step = OPTIMIZERS[optimizer](sparse.parameters())
    before = {key: parameter.detach().clone() for key, (parameter, _) in masked_parameters(sparse).items()}
    for _ in range(3):
        step.zero_grad()
        loss_of(sparse(*inputs)).backward()
        nn.utils.clip_grad_norm_(sparse.parameters(), 1.0)
        step.step()
    assert_masked_weights_are_zero(sparse)
    moved = [not torch.equal(before[key], parameter) for key, (parameter, _) in masked_parameters(sparse).items()]
    assert all(moved)
    assert all(bool(t.isfinite().all()) for t in outputs(sparse(*inputs)))


@pytest.mark.parametrize("name", ZOO)
def test_copies_and_state_dicts_keep_function_and_masks(name):
    model, inputs = build(name)
    sparse = transform(model, SPARSE, example_inputs=inputs)
    expected = seeded(sparse, inputs, training=False)
    for duplicate in (copy.deepcopy(sparse), transform(model, SPARSE.replace(seed=5))):
        duplicate.load_state_dict(sparse.state_dict())
        for left, right in zip(expected, seeded(duplicate, inputs, training=False), strict=True):
            assert torch.equal(left, right)
        optimizer = OPTIMIZERS["sgd"](duplicate.parameters())
        duplicate.train()
        loss_of(duplicate(*inputs)).backward()
        optimizer.step()
        assert_masked_weights_are_zero(duplicate)
    for left, right in zip(expected, seeded(sparse, inputs, training=False), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ZOO)
def test_the_originals_state_dict_loads_and_no_key_is_lost(name):
    model, _ = build(name)
    other, _ = build(name, seed=9)
    sparse = transform(model, SPARSE)
    assert set(model.state_dict()) <= set(sparse.state_dict())
    sparse.load_state_dict({**sparse.state_dict(), **other.state_dict()})
    assert_masked_weights_are_zero(sparse)
    for key, (parameter, mask) in masked_parameters(sparse).items():
        assert torch.equal(parameter.detach(), torch.where(mask, other.get_parameter(key), 0.0))


def test_a_plain_dictionary_of_the_original_loads_strictly():
    model = Residual()
    sparse = transform(model, SPARSE)
    sparse.load_state_dict(Residual().state_dict(), strict=True)
    assert_masked_weights_are_zero(sparse)


@pytest.mark.parametrize("name", ["residual", "depthwise", "conv1d", "linear_norm", "tied"])
def test_autocast_and_bfloat16(name):
    model, inputs = build(name)
    sparse = transform(model, SPARSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(sparse(*inputs)).backward()
    OPTIMIZERS["sgd"](sparse.parameters()).step()
    assert_masked_weights_are_zero(sparse)
    half = sparse.to(torch.bfloat16)
    half.zero_grad()
    loss_of(half(*(x.bfloat16() for x in inputs))).backward()
    OPTIMIZERS["adamw"](half.parameters()).step()
    assert_masked_weights_are_zero(half)


def test_gradient_accumulation_adds_up():
    model, inputs = build("residual")
    config = SPARSE.replace(activation_sparsity=0.0)
    sparse = transform(model.double(), config)
    x = inputs[0].double()
    loss_of(sparse(x)).backward()
    whole = [p.grad.clone() for p in sparse.parameters() if p.grad is not None]
    sparse.zero_grad()
    for part in x.split(2):
        (sum(t.square().sum() for t in outputs(sparse(part))) / sparse(x).numel()).backward()
    for expected, parameter in zip(whole, (p for p in sparse.parameters() if p.grad is not None), strict=True):
        assert torch.allclose(expected, parameter.grad, rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing():
    model, inputs = build("linear_norm")
    sparse = transform(model, SPARSE.replace(activation_sparsity=0.0))
    loss_of(sparse(*inputs)).backward()
    expected = [p.grad.clone() for p in sparse.parameters() if p.grad is not None]
    sparse.zero_grad()
    loss_of(torch.utils.checkpoint.checkpoint(sparse, *inputs, use_reentrant=False)).backward()
    for left, parameter in zip(expected, (p for p in sparse.parameters() if p.grad is not None), strict=True):
        assert torch.allclose(left, parameter.grad)


@pytest.mark.parametrize("name", ["residual", "depthwise", "drop_path", "mode_dependent"])
def test_pickle_keeps_the_function(name):
    if name == "drop_path":
        pytest.skip("a class inside a class does not pickle, transformed or not")
    model, inputs = build(name)
    sparse = transform(model, SPARSE)
    counterpart = pickle.loads(pickle.dumps(sparse))  # noqa: S301 -- made here; the product itself never pickles
    for left, right in zip(
        seeded(sparse, inputs, training=False), seeded(counterpart, inputs, training=False), strict=True
    ):
        assert torch.equal(left, right)


def test_the_optional_argument_is_specialised_and_asserted():
    model = Optional()
    sparse = transform(model, IDENTITY)
    x, scale = torch.randn(2, 6), torch.full((1,), 3.0)
    assert torch.equal(sparse(x)["out"], model(x)["out"])
    with pytest.raises(Exception, match="scale"):
        sparse(x, scale)
    with_scale = transform(model, IDENTITY, example_inputs=(x, scale))
    assert torch.equal(with_scale(x, scale)["out"], model(x, scale)["out"])


def test_training_flags_of_the_original_are_kept():
    model = Residual().train()
    model.norm.eval()
    sparse = transform(model, SPARSE)
    assert sparse.training
    assert not sparse.norm.training
    assert not transform(Residual().eval(), SPARSE).training


def test_one_sample_trains_without_batch_statistics():
    sparse = transform(Residual(), SPARSE)
    loss_of(sparse(torch.randn(1, 3, 8, 8))).backward()
    assert all(bool(p.grad.isfinite().all()) for p in sparse.parameters() if p.grad is not None)


def test_activation_variance_stays_bounded_with_depth():
    blocks = [block for _ in range(30) for block in (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
    sparse = transform(nn.Sequential(*blocks), Config(density=0.5, weight_storage="dense"))
    with torch.no_grad():
        out = sparse(torch.randn(8, 16, 16, 16))
    assert 0.05 < out.var().item() < 20


def test_gradients_are_exact_when_nothing_is_dropped():
    """NSConv with all weights and gamma 0, float64, against the equation in eager autograd."""
    model, inputs = build("residual")
    model.double()
    x = inputs[0].double()

    def kernel(conv, norm, g):
        rows = conv.weight.flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        unit = centred / (rows.std(1, correction=0, keepdim=True) * math.sqrt(rows.shape[1]))
        return (g * norm.weight[:, None] * unit).view_as(conv.weight)

    g = activation_gain(F.relu)
    out = F.relu(F.conv2d(x, kernel(model.stem, model.norm, g), model.norm.bias, padding=1))
    branch = F.relu(F.conv2d(out, kernel(model.conv1, model.norm1, g), model.norm1.bias, stride=2, padding=1))
    branch = F.conv2d(branch, kernel(model.conv2, model.norm2, 1.0), model.norm2.bias, padding=1)
    short, norm = model.shortcut
    out = F.relu((branch + F.conv2d(out, kernel(short, norm, 1.0), norm.bias, stride=2)) * math.sqrt(0.5))
    expected = model.fc(out.mean((2, 3)))
    expected.square().sum().backward()
    for gamma in (0.0, 1e-9):  # off; on, but with nothing to drop: all that is not zero is kept
        sparse = transform(model, Config(density=1.0, activation_sparsity=gamma, weight_storage="dense"))
        got = sparse(x)
        assert torch.allclose(got, expected, rtol=1e-10)
        got.square().sum().backward()
        for name, parameter in model.named_parameters():
            error = (parameter.grad - sparse.get_parameter(name).grad).norm() / parameter.grad.norm()
            assert error.item() < 1e-10, name


def test_the_gain_of_relu():
    assert activation_gain(F.relu) == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-6)


class WithDefaults(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, mask=None, *, flag=True, shape=(1, 2)):
        return self.layer(x) * (1 if mask is None else mask) * shape[1]


@pytest.mark.parametrize("examples", [True, False])
def test_optional_arguments_keep_their_names(examples):
    model, x = WithDefaults(), torch.randn(2, 4)
    sparse = transform(model, IDENTITY, example_inputs=(x,) if examples else None)
    for counterpart in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):  # noqa: S301 -- made here
        assert torch.equal(counterpart(x, mask=None, flag=True, shape=(1, 2)), model(x))
    with pytest.raises(AssertionError, match=r"traced for mask=None, the default; transform the model with example"):
        sparse(x, mask=torch.zeros(4))
    transform(WithDefaults(), IDENTITY)  # what was pickled breaks no later trace


def test_an_activation_after_a_linear_layer_on_sequences_works_in_place() -> None:
    # F.linear gives a view for inputs of three dimensions, which autograd lets nobody change in place.
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    pruned = fedmef_fx.transform(
        model, Config(density=0.5, activation_sparsity=1e-9, weight_storage="dense")
    )  # packs, and drops nothing
    dense = fedmef_fx.transform(model, Config(density=0.5, activation_sparsity=0, weight_storage="dense"))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for network in (pruned, dense):
        network(x).square().sum().backward()
    for left, right in zip(pruned.parameters(), dense.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)


class _Pools(nn.Module):
    """Functions of torch that say they are local ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.layer(x)), 2)
        return F.adaptive_max_pool2d(x, 2)


@pytest.mark.parametrize("config", [Config(density=0.5), Config(density=0.5, weight_storage="dense")])
def test_a_pickle_of_functions_that_passes_replaced(config):
    model = transform(_Pools(), config).train()
    copied = pickle.loads(pickle.dumps(model))  # noqa: S301 -- made here
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(copied(x), model(x))
