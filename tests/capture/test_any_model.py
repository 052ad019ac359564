"""Whatever a model does, its transformed version computes the same and keeps its masks."""

import copy
import pickle

import pytest
import torch

from fedmef_fx import Config, coverage, masks, transform
from fedmef_fx.capture.proof import tensors_within
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.capture.models import ZOO, build

IDENTITY = Config(density=1.0, normalization="keep", activation_sparsity=0.0, weight_storage="dense")
SPARSE = Config(density=0.3, normalization="keep", activation_sparsity=0.0, weight_storage="dense")
FRACTIONS = {  # of the weights that stand in graphs larger than a layer
    "data-dependent": 0.83,
    "recurrent": 0.46,
    "checkpointed": 0.92,
}

# torch refuses to pickle parametrized modules, and a GraphModule that calls an autograd function.
NOT_PICKLED = ("parametrized", "custom-gradient")


def run(model, call, *, training, seed=3):
    model.train(training)
    torch.manual_seed(seed)
    args, kwargs = call
    return model(*args, **kwargs)


def assert_same(expected, got):
    assert type(expected) is type(got)
    left, right = list(tensors_within(expected)), list(tensors_within(got))
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


def train(model, inputs, steps=3):
    """A few steps of an optimizer that moves whatever has a gradient or decays."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        result = run(model, inputs(), training=True, seed=step)
        sum(t.square().mean() for t in tensors_within(result) if t.requires_grad).backward()
        optimizer.step()


def assert_masks_hold(model):
    parameters = masked_parameters(model)
    assert parameters
    for name, (parameter, mask) in parameters.items():
        assert not parameter.detach()[~mask].any(), name


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "bare"])
@pytest.mark.parametrize("name", ZOO)
def test_computes_the_same(name, examples):
    model, inputs = build(name)
    args, kwargs = inputs()
    given = {"example_inputs": args, "example_kwargs": kwargs} if examples else {}
    counterpart = transform(model, IDENTITY, **given)
    assert set(model.state_dict()) <= set(counterpart.state_dict())
    for training in (True, False, True):
        call = inputs()
        expected = run(model, copy.deepcopy(call), training=training)
        got = run(counterpart, copy.deepcopy(call), training=training)
        assert_same(expected, got)
        model.zero_grad()
        counterpart.zero_grad()
        for result in (expected, got):
            sum(t.square().mean() for t in tensors_within(result) if t.requires_grad).backward()
        for key, parameter in model.named_parameters():
            gradient = counterpart.get_parameter(key).grad
            assert (parameter.grad is None) == (gradient is None), key
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient)
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, counterpart.get_buffer(key))


@pytest.mark.parametrize("name", ZOO)
def test_the_original_is_untouched(name):
    model, inputs = build(name)
    state = copy.deepcopy(model.state_dict())
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    args, kwargs = inputs()
    transform(model, SPARSE, example_inputs=args, example_kwargs=kwargs)
    assert {path: type(module) for path, module in model.named_modules()}
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "bare"])
@pytest.mark.parametrize("name", ZOO)
def test_masked_weights_stay_zero(name, examples):
    if name == "functional" and not examples:
        pytest.skip("which of its parameters are weights shows only in a call")
    model, inputs = build(name)
    args, kwargs = inputs()
    given = {"example_inputs": args, "example_kwargs": kwargs} if examples else {}
    sparse = transform(model, SPARSE, **given)
    train(sparse, inputs)
    assert_masks_hold(sparse)
    copied = copy.deepcopy(sparse)
    train(copied, inputs)
    assert_masks_hold(copied)
    assert_masks_hold(sparse)


@pytest.mark.parametrize("name", ZOO)
def test_graph_fraction(name):
    model, inputs = build(name)
    args, kwargs = inputs()
    found = coverage(transform(model, SPARSE, example_inputs=args, example_kwargs=kwargs))
    assert found.graph_fraction == pytest.approx(FRACTIONS.get(name, 1.0), abs=0.01), str(found)
    assert all(row.tier == "graph" or row.reason for row in found.rows)


@pytest.mark.parametrize("name", ZOO)
def test_copies_pickles_and_state_dicts(name):
    model, inputs = build(name)
    args, kwargs = inputs()
    sparse = transform(model, SPARSE, example_inputs=args, example_kwargs=kwargs).eval()
    expected = run(sparse, (args, kwargs), training=False)
    assert_same(expected, run(copy.deepcopy(sparse), (args, kwargs), training=False))
    if name not in NOT_PICKLED:
        assert_same(expected, run(pickle.loads(pickle.dumps(sparse)), (args, kwargs), training=False))  # noqa: S301
    sparse.load_state_dict(model.state_dict())
    assert_masks_hold(sparse)


@pytest.mark.parametrize("name", ["shared", "data-dependent", "recurrent", "functional"])
def test_another_batch_size(name):
    model, inputs = build(name)
    args, kwargs = inputs()
    counterpart = transform(model, IDENTITY, example_inputs=args, example_kwargs=kwargs)
    sparse = transform(model, SPARSE, example_inputs=args, example_kwargs=kwargs)

    def larger():
        return (torch.cat([inputs()[0][0]] * 3),), {}

    for training in (True, False):
        call = larger()
        assert_same(run(model, call, training=training), run(counterpart, call, training=training))
    train(sparse, larger)
    assert_masks_hold(sparse)


def test_reasons_name_the_line():
    model, inputs = build("data-dependent")
    rows = {row.name: row for row in coverage(transform(model, SPARSE, example_inputs=inputs()[0])).rows}
    assert (rows["body.0.weight"].tier, rows["body.0.weight"].reason) == ("graph", "")
    assert rows["head.weight"].tier == "module"
    assert rows["by_hand"].tier == "hook"
    assert "x.sum() > 0" in rows["head.weight"].reason
    assert "models.py" in rows["head.weight"].reason


def test_tied_weights_stay_dense_with_their_embedding():
    model, inputs = build("tied")
    sparse = transform(model, SPARSE, example_inputs=inputs()[0])
    (row,) = (row for row in coverage(sparse).rows if row.name == "embed.weight")
    assert not row.masked
    assert "embedding" in row.reason
    assert set(masks(sparse)) == {"mix.weight"}


def test_parametrized_weights():
    model, inputs = build("parametrized")
    sparse = transform(model, SPARSE, example_inputs=inputs()[0])
    rows = {row.name: row for row in coverage(sparse).rows}
    assert rows["normed.parametrizations.weight.original1"].masked
    assert "normed.parametrizations.weight.original0" not in rows  # the magnitudes
    assert not sparse.normed.weight[~masks(sparse)["normed.parametrizations.weight.original1"]].any()
    assert "does not keep zeros" in rows["turned.parametrizations.weight.original"].reason
