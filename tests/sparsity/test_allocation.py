import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import allocate

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=3), st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), max_size=6
)


@given(shapes=SHAPES, density=st.floats(0.001, 1.0), method=st.sampled_from(["erk", "uniform"]))
def test_the_budget_is_met_exactly_and_every_layer_stays_within_its_bounds(shapes, density, method):
    counts = allocate(shapes, density, method=method)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = round(density * sum(sizes.values()))
    assert list(counts) == list(shapes)
    assert sum(counts.values()) == budget
    least = 1 if budget >= len(shapes) else 0
    assert all(least <= counts[name] <= sizes[name] for name in shapes)


def test_erk_gives_shares_in_proportion_to_the_sum_of_dimensions():
    # (64+64+3+3) / (64*64*3*3) for the convolution and (512+10) / (512*10) for the linear layer: the ratio of the
    # active weights is 134 : 522, and round(0.01 * (36864 + 5120)) = 420 of them are shared.
    counts = allocate({"conv": (64, 64, 3, 3), "fc": (10, 512)}, 0.01, method="erk")
    assert counts == {"conv": 86, "fc": 334}  # 420 * 134 / 656 = 85.8


def test_erk_layers_without_room_become_dense_and_the_others_share_the_rest():
    # Budget 0.5 * 116 = 58 in the ratio 8 : 20 would give "small" 16.6, but it has 16.
    assert allocate({"small": (4, 4), "large": (10, 10)}, 0.5, method="erk") == {"small": 16, "large": 42}


def test_uniform_gives_every_layer_the_same_density():
    assert allocate({"a": (10, 10), "b": (20,), "c": (4, 5, 2)}, 0.25, method="uniform") == {"a": 25, "b": 5, "c": 10}


def test_a_layer_whose_share_is_below_one_weight_gets_one():
    assert allocate({"tiny": (2,), "large": (1000,)}, 0.1, method="uniform") == {"tiny": 1, "large": 99}


def test_layers_with_the_smallest_shares_get_nothing_when_the_budget_is_below_one_weight_each():
    assert allocate({"a": (1,), "b": (60,), "c": (39,)}, 0.02, method="uniform") == {"a": 0, "b": 1, "c": 1}


def test_equal_remainders_are_rounded_in_order():
    assert allocate({"x": (3,), "y": (3,), "z": (3,)}, 4 / 9, method="uniform") == {"x": 2, "y": 1, "z": 1}


def test_density_one_keeps_everything():
    assert allocate({"a": (3, 2), "scalar": (), "none": (0, 4)}, 1.0, method="erk") == {"a": 6, "scalar": 1, "none": 0}


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
def test_a_density_out_of_range_is_rejected(density):
    with pytest.raises(ConfigError, match=r"density: got .* expected a number in \(0, 1\]"):
        allocate({"a": (3,)}, density, method="erk")


def test_an_unknown_method_is_rejected():
    with pytest.raises(ConfigError, match=r"got 'ERK'; expected 'erk' \| 'uniform'"):
        allocate({"a": (3,)}, 0.5, method="ERK")  # type: ignore[arg-type]


def test_a_negative_dimension_is_rejected():
    with pytest.raises(ConfigError, match=r"'a': got shape \(3, -1\)"):
        allocate({"a": (3, -1)}, 0.5, method="erk")
