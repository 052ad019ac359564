"""`transform` as its users meet it: parity, masks that hold whatever happens to the model, and bad input."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config, report, transform
from fedmef_fx.errors import ConfigError, FedmefError
from fedmef_fx.model import masked_parameters
from fedmef_fx.passes._activations import activation_gain
from tests.models import ZOO, Optional, Residual, Tied, build

IDENTITY = Config(density=1.0, normalization="keep", activation_sparsity=0.0)
SPARSE = Config(density=0.3)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


def outputs(result):
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def seeded(model, inputs, *, training, seed=1):
    model.train(training)
    torch.manual_seed(seed)
    return outputs(model(*inputs))


def loss_of(result):
    return sum(tensor.square().mean() for tensor in outputs(result))


def assert_masked_weights_are_zero(model):
    entries = masked_parameters(model)
    assert entries
    for name, (parameter, mask) in entries.items():
        assert bool((parameter.detach()[~mask] == 0).all()), name


@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_identity_configuration_is_bitwise_the_original(name, examples):
    model, inputs = build(name)
    twin = transform(model, IDENTITY, example_inputs=inputs if examples else None)
    unseen = tuple(torch.randn_like(x) * 3 for x in inputs)
    for training in (False, True):
        for given in (inputs, unseen):
            expected = seeded(model, given, training=training)
            got = seeded(twin, given, training=training)
            assert len(expected) == len(got)
            for left, right in zip(expected, got, strict=True):
                assert torch.equal(left, right)
            model.zero_grad()
            twin.zero_grad()
            sum(t.square().mean() for t in expected).backward()
            sum(t.square().mean() for t in got).backward()
            for key, parameter in model.named_parameters():
                got_grad = twin.get_parameter(key).grad
                assert (parameter.grad is None) == (got_grad is None), key
                assert parameter.grad is None or torch.equal(parameter.grad, got_grad), key
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, twin.get_buffer(key)), key


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
    twin = pickle.loads(pickle.dumps(sparse))  # noqa: S301 -- made here; the product itself never pickles
    for left, right in zip(seeded(sparse, inputs, training=False), seeded(twin, inputs, training=False), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_density_is_exact_to_one_weight(density, allocation):
    sparse = transform(Residual(), Config(density=density, allocation=allocation))
    entries = masked_parameters(sparse).values()
    total = sum(entry.mask.numel() for entry in entries)
    assert abs(sum(int(entry.mask.sum()) for entry in entries) - density * total) <= 1
    assert fedmef_fx.density(sparse) == pytest.approx(density, abs=1 / total)


def test_density_one_prunes_nothing_and_inserts_no_masks():
    sparse = transform(Residual(), Config(density=1.0))
    assert fedmef_fx.masks(sparse) == {}
    assert fedmef_fx.density(sparse) == 1.0
    assert not any(key.endswith("_mask") for key in sparse.state_dict())


def test_magnitude_masks_keep_the_largest_weights():
    model = Residual()
    sparse = transform(model, Config(density=0.3, mask_init="magnitude"))
    for name, mask in fedmef_fx.masks(sparse).items():
        weight = model.get_parameter(name).detach().abs()
        if bool(mask.all()):
            continue
        assert weight[mask].min() >= weight[~mask].max()


def test_tied_weights_share_one_mask():
    sparse = transform(Tied(), Config(density=0.5))
    assert set(fedmef_fx.masks(sparse)) == {"first.weight", "by_hand"}
    assert sparse.first.weight is sparse.second.weight
    sparse(torch.randn(2, 6)).sum().backward()
    mask = fedmef_fx.masks(sparse)["first.weight"]
    assert bool((sparse.first.weight.grad[~mask] == 0).all())


def test_set_masks_zeroes_grown_weights_and_keeps_the_optimizer_valid():
    model, inputs = build("residual")
    sparse = transform(model, SPARSE)
    optimizer = OPTIMIZERS["sgd"](sparse.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(sparse(*inputs)).backward()
        optimizer.step()
    old = fedmef_fx.masks(sparse)
    values = {name: entry.parameter.detach().clone() for name, entry in masked_parameters(sparse).items()}
    new = {name: mask.roll(1, -1) for name, mask in old.items()}
    fedmef_fx.set_masks(sparse, new)
    for name, (parameter, mask) in masked_parameters(sparse).items():
        assert torch.equal(mask, new[name])
        assert torch.equal(parameter.detach(), torch.where(old[name] & mask, values[name], 0.0))
    optimizer.zero_grad()
    loss_of(sparse(*inputs)).backward()
    optimizer.step()
    assert_masked_weights_are_zero(sparse)


def test_set_masks_refuses_and_changes_nothing():
    sparse = transform(Residual(), SPARSE)
    before = fedmef_fx.masks(sparse)
    good = {"conv1.weight": ~before["conv1.weight"]}
    with pytest.raises(ConfigError, match=r"'nope' has no mask.*conv1\.weight"):
        fedmef_fx.set_masks(sparse, {**good, "nope": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ConfigError, match=r"expected torch.bool of shape \(16, 16, 3, 3\)"):
        fedmef_fx.set_masks(sparse, {**good, "conv2.weight": torch.ones(16, 16, 3, 3)})
    after = fedmef_fx.masks(sparse)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_ignore_by_name_glob_and_type():
    model = Residual()
    names = set(fedmef_fx.masks(transform(model, SPARSE)))
    by_name = transform(model, SPARSE.replace(ignore=("conv1",)))
    assert set(fedmef_fx.masks(by_name)) == names - {"conv1.weight"}
    by_glob = transform(model, SPARSE.replace(ignore=("conv*",)))
    assert set(fedmef_fx.masks(by_glob)) == names - {"conv1.weight", "conv2.weight"}
    by_type = transform(model, SPARSE.replace(ignore=(nn.Linear,)))
    assert set(fedmef_fx.masks(by_type)) == names - {"fc.weight"}
    rows = {row.name: row for row in fedmef_fx.coverage(by_name).rows}
    assert rows["conv1.weight"].reason == "ignored by Config.ignore"


def test_names_are_matched_whole_and_not_by_prefix():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12)))
    sparse = transform(model, Config(density=0.5, ignore=("1",)))
    assert set(fedmef_fx.masks(sparse)) == {f"{i}.weight" for i in range(12) if i != 1}


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
    sparse = transform(nn.Sequential(*blocks), Config(density=0.5))
    with torch.no_grad():
        out = sparse(torch.randn(8, 16, 16, 16))
    assert 0.05 < out.var().item() < 20


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        if x.sum() > 0:
            return self.layer(x)
        return x


class Counting(Untraceable):
    def forward(self, x):
        self.calls += 1
        return self.layer(x)


class PythonRandom(Untraceable):
    def forward(self, x):
        import random  # noqa: PLC0415

        return self.layer(x) * random.random()  # noqa: S311


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Untraceable, r"Untraceable: torch.fx cannot trace forward .*x\.sum\(\) > 0"),
        (Counting, r"changes the attribute 'calls'"),
        (PythonRandom, r"Python's or NumPy's random numbers"),
    ],
)
def test_what_cannot_be_traced_keeps_its_python_and_its_masks(model, message):
    instance = model()
    sparse = transform(instance, SPARSE)
    assert instance.calls == 0
    refusals = report(sparse)["capture"].refusals
    assert re.search(message, str(refusals[0])), refusals
    assert [row.tier for row in fedmef_fx.coverage(sparse).rows] == ["module"]
    optimizer = OPTIMIZERS["sgd"](sparse.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(sparse(torch.rand(2, 4))).backward()
        optimizer.step()
    assert_masked_weights_are_zero(sparse)


def test_random_tensors_stay_random():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) + torch.rand(4) + torch.randn_like(x)

    model = Noise()
    sparse = transform(model, IDENTITY)
    x = torch.randn(2, 4)
    for seed in (1, 2):
        assert torch.equal(*(seeded(m, (x,), training=True, seed=seed)[0] for m in (model, sparse)))
    assert not torch.equal(sparse(x), sparse(x))


@pytest.mark.parametrize("density", [0, 0.0, 1.5, -0.1, math.nan])
def test_density_out_of_range(density):
    with pytest.raises(ConfigError, match=r"Config\.density: got .*; expected a number in \(0, 1\]"):
        Config(density=density)


def test_a_model_without_prunable_weights():
    with pytest.raises(ConfigError, match="Sequential has no prunable weights"):
        transform(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)))


def test_an_unknown_name_in_ignore():
    with pytest.raises(ConfigError, match=r"no module of Residual is named 'conv3'; did you mean .*'conv"):
        transform(Residual(), Config(ignore=("conv3",)))


def test_integer_inputs_to_a_convolution():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.int64)
    with pytest.raises(
        ConfigError, match=r"Residual itself fails on the example inputs \(x=torch.int64\[1, 3, 8, 8\]\)"
    ):
        transform(Residual(), example_inputs=(x,))
    with pytest.raises(FedmefError, match="expected a floating point"):
        transform(Residual())(x)


def test_example_inputs_of_the_wrong_arity():
    with pytest.raises(ConfigError, match=r"do not fit Residual\.forward\(x.*got 2 positional"):
        transform(Residual(), example_inputs=(torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ConfigError, match=r"expected a tuple of arguments"):
        transform(Residual(), example_inputs=torch.zeros(1, 3, 8, 8))


def test_transforming_twice_is_refused():
    with pytest.raises(ConfigError, match="transformed already"):
        transform(transform(Residual()))


def test_untransformed_models_are_named():
    for call in (fedmef_fx.masks, fedmef_fx.density, fedmef_fx.coverage, fedmef_fx.report):
        with pytest.raises(ConfigError, match=r"Residual is not a transformed model"):
            call(Residual())


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
        sparse = transform(model, Config(density=1.0, activation_sparsity=gamma))
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
    for twin in (sparse, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):  # noqa: S301 -- made here
        assert torch.equal(twin(x, mask=None, flag=True, shape=(1, 2)), model(x))
    with pytest.raises(AssertionError, match=r"traced for mask=None, the default; transform the model with example"):
        sparse(x, mask=torch.zeros(4))
    transform(WithDefaults(), IDENTITY)  # what was pickled breaks no later trace


def test_a_name_that_cannot_stand_in_code_is_refused():
    model = nn.Sequential()
    model.add_module('a"b', nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"module name 'a\"b' has quotes"):
        transform(model)


def test_an_activation_after_a_linear_layer_on_sequences_works_in_place() -> None:
    # F.linear gives a view for inputs of three dimensions, which autograd lets nobody change in place.
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    pruned = fedmef_fx.transform(model, Config(density=0.5, activation_sparsity=1e-9))  # packs, and drops nothing
    dense = fedmef_fx.transform(model, Config(density=0.5, activation_sparsity=0))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for network in (pruned, dense):
        network(x).square().sum().backward()
    for left, right in zip(pruned.parameters(), dense.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)
