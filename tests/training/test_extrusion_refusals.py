"""`Extrusion` refuses what it cannot work with, and says why."""

import math

import pytest
from torch import nn
from torch.optim import SGD

from fedmef_fx.errors import ConfigError
from fedmef_fx.training.extrusion import Extrusion
from tests.training.extrusion_models import make_model


def test_only_parameters_that_the_optimizer_trains_are_marked():
    model = make_model()
    with Extrusion(model, SGD([model.b.weight], lr=0.1), budget_steps=2) as extrusion:
        assert list(extrusion.marked) == ["b.weight"]


def test_a_model_that_was_not_transformed_is_rejected():
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="is not a transformed model"):
        Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2)


def test_a_model_without_masks_is_rejected():
    model = make_model(masked=False, density=1.0)
    with pytest.raises(ConfigError, match="no masks"):
        Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2)


def test_an_optimizer_of_another_model_is_rejected():
    with pytest.raises(ConfigError, match="holds none of the model's masked parameters"):
        Extrusion(make_model(), SGD(make_model().parameters(), lr=0.1), budget_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_steps": 0}, "budget_steps: got 0"),
        ({"accumulation_steps": 0}, "accumulation_steps: got 0"),
        ({"strength": -1.0}, "strength: got -1"),
        ({"strength": math.nan}, "strength: got nan"),
        ({"round_index": 3}, "stop=100"),
        ({"counts": {"c.weight": 1}}, "'c.weight' has no mask; masked parameters: a.weight, b.weight"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments, message):
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        Extrusion(model, SGD(model.parameters(), lr=0.1), **({"budget_steps": 2} | arguments))


def test_more_marks_than_active_weights_are_rejected():
    model = make_model()
    with (
        pytest.raises(ConfigError, match="k=21"),
        Extrusion(model, SGD(model.parameters(), lr=0.1), budget_steps=2, counts={"a.weight": 21}),
    ):
        pass
