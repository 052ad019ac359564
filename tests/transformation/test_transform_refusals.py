"""`transform` on what it cannot rewrite: Python and its masks stay, and bad input is an error that says why."""

import math
import re

import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config, report, transform
from fedmef_fx.errors import ConfigError, FedmefError
from tests.models import Residual
from tests.transform_checks import IDENTITY, OPTIMIZERS, SPARSE, assert_masked_weights_are_zero, loss_of, seeded


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


def test_a_name_that_cannot_stand_in_code_is_refused():
    model = nn.Sequential()
    model.add_module('a"b', nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"module name 'a\"b' has quotes"):
        transform(model)
