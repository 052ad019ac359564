import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import extrusion_rate, floored_rate, rex

SIGMOID_OF_1 = 0.7310585786300049


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 1.0), (1, 6 / 7), (2, 4 / 6), (3, 2 / 5), (4, 0.0), (5, 0.0)],  # (2*4 - 2s) / (2*4 - s)
)
def test_rex_of_equation_3(step, expected):
    assert rex(step, 4) == expected


def test_beta_of_equation_4():
    # p(2) = 4/6, 2 * sigmoid(1) - 1 = 0.4621171572600098, eta_0 = 0.3
    expected = 4 / 6 * (2 * SIGMOID_OF_1 - 1) * 0.3
    assert extrusion_rate(2, budget=4, norm=1.0, initial_rate=0.3) == pytest.approx(expected, rel=1e-12)


def test_beta_uses_the_norm_and_not_its_square():
    # For theta_low = (3, 4) / 10 the norm is 0.5: 2 * sigmoid(0.5) - 1 = 0.2449186624037092; 0.25 would give 0.124.
    assert extrusion_rate(0, budget=4, norm=0.5, initial_rate=1.0) == pytest.approx(0.2449186624037092, rel=1e-12)


def test_mu_of_equation_5():
    beta = extrusion_rate(1, budget=4, norm=2.0, initial_rate=0.1)
    assert floored_rate(0.01, step=1, budget=4, norm=2.0, initial_rate=0.1) == beta > 0.01
    assert floored_rate(0.09, step=1, budget=4, norm=2.0, initial_rate=0.1) == 0.09


@given(step=st.integers(0, 60), norm=st.floats(0, 1e6), initial=st.floats(1e-6, 10.0))
def test_a_constant_schedule_is_never_raised(step, norm, initial):
    assert floored_rate(initial, step=step, budget=50, norm=norm, initial_rate=initial) == initial


def test_nothing_is_left_to_extrude_or_no_budget_is_left():
    assert extrusion_rate(0, budget=4, norm=0.0, initial_rate=0.3) == 0.0
    assert extrusion_rate(4, budget=4, norm=9.0, initial_rate=0.3) == 0.0


@pytest.mark.parametrize(("step", "budget", "norm"), [(-1, 4, 1.0), (0, 0, 1.0), (0, 4, -1.0), (0, 4, math.nan)])
def test_arguments_out_of_range_are_rejected(step, budget, norm):
    with pytest.raises(ConfigError, match="expected"):
        extrusion_rate(step, budget=budget, norm=norm, initial_rate=0.1)
