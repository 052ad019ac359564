import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import adjustment_count, is_adjustment_round


def test_adjustment_rounds_are_every_interval_before_the_stop_and_not_every_round():
    assert [t for t in range(100) if is_adjustment_round(t, interval=10, stop=40)] == [10, 20, 30]
    assert [t for t in range(5) if is_adjustment_round(t, interval=1, stop=3)] == [1, 2]
    assert not is_adjustment_round(0, interval=10, stop=0)


@pytest.mark.parametrize(
    ("round_index", "expected"),
    [
        (0, 40),  # 0.2 * (1 + 1) * 100
        (25, 34),  # 0.2 * (1 + 0.70710678) * 100 = 34.14
        (50, 20),  # 0.2 * (1 + 0) * 100
        (75, 5),  # 0.2 * (1 - 0.70710678) * 100 = 5.86
        (100, 0),
        (1000, 0),
    ],
)
def test_count_follows_the_cosine(round_index, expected):
    assert adjustment_count(100, 900, round_index=round_index, stop=100, rate=0.4) == expected


def test_count_is_capped_by_the_inactive_weights():
    assert adjustment_count(100, 7, round_index=0, stop=100, rate=0.4) == 7


def test_rounding_noise_does_not_cost_a_weight():
    assert 0.29 / 2 * 2 * 100 < 29
    assert adjustment_count(100, 900, round_index=0, stop=100, rate=0.29) == 29


@given(
    active=st.integers(0, 10**7),
    inactive=st.integers(0, 10**7),
    round_index=st.integers(0, 300),
    stop=st.integers(0, 300),
    rate=st.floats(0.01, 1.0),
)
def test_count_never_exceeds_what_there_is(active, inactive, round_index, stop, rate):
    count = adjustment_count(active, inactive, round_index=round_index, stop=stop, rate=rate)
    assert 0 <= count <= min(active, inactive, math.ceil(rate * active))


@pytest.mark.parametrize(
    "change", [{"active": -1}, {"inactive": -1}, {"round_index": -1}, {"rate": 0.0}, {"rate": 1.5}, {"rate": math.nan}]
)
def test_arguments_out_of_range_are_rejected(change):
    arguments = {"active": 10, "inactive": 10, "round_index": 0, "stop": 10, "rate": 0.4} | change
    active, inactive = arguments.pop("active"), arguments.pop("inactive")
    with pytest.raises(ConfigError, match="expected"):
        adjustment_count(active, inactive, **arguments)


@pytest.mark.parametrize(("round_index", "interval"), [(-1, 10), (0, 0)])
def test_a_negative_round_and_an_interval_below_one_are_rejected(round_index, interval):
    with pytest.raises(ConfigError, match="expected an integer"):
        is_adjustment_round(round_index, interval=interval, stop=10)
