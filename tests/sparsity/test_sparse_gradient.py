import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import SparseGradient, average_sparse_gradients

NUMEL = 8


@st.composite
def gradients(draw: st.DrawFn) -> SparseGradient:
    positions = sorted(draw(st.sets(st.integers(0, NUMEL - 1))))
    values = draw(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=len(positions), max_size=len(positions)),
    )
    return SparseGradient(torch.tensor(positions, dtype=torch.int64), torch.tensor(values), NUMEL)


@given(clients=st.lists(st.tuples(gradients(), st.integers(1, 10**6)), min_size=1, max_size=5), data=st.data())
def test_the_average_does_not_depend_on_the_order_of_clients(clients, data):
    average = average_sparse_gradients(clients)
    other = average_sparse_gradients(data.draw(st.permutations(clients)))
    assert torch.equal(average.positions, other.positions)
    assert torch.equal(average.values, other.values)


@given(clients=st.lists(st.tuples(gradients(), st.integers(1, 1000)), min_size=1, max_size=4))
def test_the_average_is_the_dense_average_with_zero_for_what_was_left_out(clients):
    average = average_sparse_gradients(clients)
    total = sum(weight for _, weight in clients)
    exact = [Fraction(0)] * NUMEL
    for gradient, weight in clients:
        for position, value in zip(gradient.positions.tolist(), gradient.values.tolist(), strict=True):
            exact[position] += Fraction(value) * weight / total
    result = dict(zip(average.positions.tolist(), average.values.tolist(), strict=True))
    # Sums are made in float64 and rounded once to float32: 2^-24 relative, and cancellation of terms up to 1e9.
    assert all(math.isclose(result.get(i, 0.0), exact[i], rel_tol=1e-7, abs_tol=1e-6) for i in range(NUMEL))


def test_a_hand_computed_average():
    first = SparseGradient(torch.tensor([0, 2]), torch.tensor([4.0, -8.0]), NUMEL)
    second = SparseGradient(torch.tensor([2, 5]), torch.tensor([4.0, 2.0]), NUMEL)
    average = average_sparse_gradients([(first, 1), (second, 3)])
    assert average.positions.tolist() == [0, 2, 5]
    assert average.values.tolist() == [1.0, 1.0, 1.5]  # 4 * 1/4; (-8 * 1 + 4 * 3) / 4; 2 * 3/4
    assert average.values.dtype == torch.float32


def test_the_weighted_average_is_not_the_average_over_those_who_sent():
    sent = SparseGradient(torch.tensor([1]), torch.tensor([6.0]), NUMEL)
    silent = SparseGradient(torch.empty(0, dtype=torch.int64), torch.empty(0), NUMEL)
    assert average_sparse_gradients([(sent, 1), (silent, 2)]).values.tolist() == [2.0]


def test_double_precision_is_kept():
    gradient = SparseGradient(torch.tensor([1]), torch.tensor([0.1], dtype=torch.float64), NUMEL)
    assert average_sparse_gradients([(gradient, 1)]).values.dtype == torch.float64


@pytest.mark.parametrize(
    ("positions", "values", "message"),
    [
        ([3, 1], [1.0, 2.0], "strictly ascending"),
        ([1, 1], [1.0, 2.0], "strictly ascending"),
        ([-1, 1], [1.0, 2.0], r"positions in \[0, 8\)"),
        ([1, 8], [1.0, 2.0], r"positions in \[0, 8\)"),
        ([1], [1.0, 2.0], "floating point of"),
        ([1], [math.inf], "finite values"),
        ([1], [math.nan], "finite values"),
        ([[1]], [[1.0]], r"int64 of shape \[k\]"),
        ([1.0], [1.0], r"int64 of shape \[k\]"),
        ([1], [1], "floating point"),
    ],
)
def test_invalid_gradients_are_rejected(positions, values, message):
    with pytest.raises(ConfigError, match=message):
        SparseGradient(torch.tensor(positions), torch.tensor(values), NUMEL)


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_not_positive_is_rejected(weight):
    gradient = SparseGradient(torch.tensor([1]), torch.tensor([0.1]), NUMEL)
    with pytest.raises(ConfigError, match="expected a finite number > 0"):
        average_sparse_gradients([(gradient, weight)])


def test_no_gradients_and_gradients_of_different_parameters_are_rejected():
    with pytest.raises(ConfigError, match="no gradients"):
        average_sparse_gradients([])
    small, large = (SparseGradient(torch.tensor([1]), torch.tensor([0.1]), numel) for numel in (4, 5))
    with pytest.raises(ConfigError, match="4 and 5 weights"):
        average_sparse_gradients([(small, 1), (large, 1)])
