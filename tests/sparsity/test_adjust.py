import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.sparsity import SparseGradient, adjust_mask, lowest_magnitude
from tests.references import largest_inactive

VALUES = st.sampled_from([-3.0, -1.0, 0.0, 1.0, 2.0, 2.0])


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, mask and dense gradient of one layer, with many ties."""
    size = draw(st.integers(1, 12))
    weight, gradient = (torch.tensor(draw(st.lists(VALUES, min_size=size, max_size=size))) for _ in range(2))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    return weight * mask, mask, gradient


def test_the_lowest_are_looked_for_among_active_weights_only():
    # At density 0.25 the three masked zeros are lower than every weight, and pruning them would do nothing.
    weight = torch.tensor([[0.0, 0.5, 0.0, -0.1], [0.0, 0.9, 0.0, 0.0]])
    mask = torch.tensor([[False, True, False, True], [False, True, False, False]])
    assert lowest_magnitude(weight, mask, 2).tolist() == [1, 3]


def test_an_active_weight_that_is_zero_is_the_lowest():
    # Grown weights start at 0 and are active.
    assert lowest_magnitude(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([False, True, True]), 1).tolist() == [1]


@given(layer=layers(), data=st.data())
def test_the_lowest_are_exactly_k_and_ties_go_by_position(layer, data):
    weight, mask, _ = layer
    active = [index for index, on in enumerate(mask.tolist()) if on]
    k = data.draw(st.integers(0, len(active)))
    expected = sorted(active, key=lambda index: (abs(weight[index].item()), index))[:k]
    assert lowest_magnitude(weight, mask, k).tolist() == sorted(expected)


def test_positions_are_row_major_in_every_memory_layout():
    weight = torch.arange(1.0, 17.0).reshape(2, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    mask = torch.ones_like(weight, dtype=torch.bool)
    assert lowest_magnitude(weight, mask, 3).tolist() == [0, 1, 2]


@given(layer=layers(), k=st.integers(0, 14))
def test_an_adjustment_keeps_the_budget_and_grows_nothing_it_pruned(layer, k):
    weight, mask, gradient = layer
    sent = largest_inactive(gradient, mask, int((~mask).sum()))
    before = mask.clone()
    adjusted = adjust_mask(weight, mask, sent, k)
    assert torch.equal(mask, before)
    assert int(adjusted.sum()) == int(mask.sum())
    pruned, grown = mask & ~adjusted, adjusted & ~mask
    candidates = int((~mask & (gradient != 0)).sum())
    assert int(pruned.sum()) == int(grown.sum()) == min(k, candidates, int(mask.sum()))
    if pruned.any() and (mask & adjusted).any():
        assert weight[pruned].abs().max() <= weight[mask & adjusted].abs().min()
    if grown.any() and (~mask & ~adjusted).any():
        assert gradient[grown].abs().min() >= gradient[~mask & ~adjusted].abs().max()


def test_a_hand_computed_adjustment():
    weight = torch.tensor([[0.9, 0.0, -0.2], [0.0, 0.5, 0.0]])
    mask = weight != 0
    gradient = SparseGradient(torch.tensor([1, 3, 5]), torch.tensor([0.1, -0.7, 0.3]), 6)
    expected = torch.tensor([[True, False, False], [True, True, False]])
    assert torch.equal(adjust_mask(weight, mask, gradient, 1), expected)


def test_gradients_sent_for_active_coordinates_are_no_candidates():
    weight = torch.tensor([0.1, 0.9, 0.0, 0.0])
    gradient = SparseGradient(torch.tensor([0, 1, 3]), torch.tensor([9.0, 9.0, 0.5]), 4)
    assert adjust_mask(weight, weight != 0, gradient, 2).tolist() == [False, True, False, True]


def test_without_candidates_nothing_is_pruned():
    weight = torch.tensor([0.1, 0.9, 0.0])
    nothing = SparseGradient(torch.empty(0, dtype=torch.int64), torch.empty(0), 3)
    assert torch.equal(adjust_mask(weight, weight != 0, nothing, 2), weight != 0)


def test_an_average_that_cancels_to_zero_is_no_candidate():
    weight = torch.tensor([0.1, 0.9, 0.0])
    cancelled = SparseGradient(torch.tensor([2]), torch.tensor([0.0]), 3)
    assert torch.equal(adjust_mask(weight, weight != 0, cancelled, 1), weight != 0)


def test_the_k_lowest_of_more_than_are_active_are_rejected():
    with pytest.raises(ConfigError, match="k=2; expected 0 <= k <= 1"):
        lowest_magnitude(torch.ones(2), torch.tensor([True, False]), 2)


def test_wrong_masks_and_sizes_are_rejected():
    weight, mask = torch.ones(2, 2), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"expected torch.bool\[2, 2\]"):
        lowest_magnitude(weight, mask, 1)
    with pytest.raises(ConfigError, match=r"torch\.float32"):
        lowest_magnitude(weight, weight, 1)
    gradient = SparseGradient(torch.tensor([0]), torch.ones(1), 5)
    with pytest.raises(ConfigError, match="of 5 weights; expected 4"):
        adjust_mask(weight, mask.reshape(2, 2), gradient, 1)
    with pytest.raises(ConfigError, match="k: got -1"):
        adjust_mask(torch.ones(5), torch.ones(5, dtype=torch.bool), gradient, -1)
