"""`MaskedParameter`: both storages answer alike, for any mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmef_fx.packing import pack_bits
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, resize

SHAPE = torch.Size((3, 5))


def both(weight: Tensor, mask: Tensor) -> tuple[MaskedParameter, MaskedParameter]:
    """The same masked weight in dense and in packed storage."""
    dense = MaskedParameter(nn.Parameter(weight * mask), mask.clone(), weight.shape)
    return dense, MaskedParameter(nn.Parameter(weight[mask]), pack_bits(mask), weight.shape)


masks = st.lists(st.booleans(), min_size=15, max_size=15).map(lambda bits: torch.tensor(bits).view(SHAPE))


@given(mask=masks, positions=st.lists(st.integers(0, 14), unique=True))
def test_both_storages_answer_alike(mask: Tensor, positions: list[int]) -> None:
    weight = torch.arange(1.0, 16.0).view(SHAPE)
    dense, packed = both(weight, mask)
    assert not dense.is_packed
    assert packed.is_packed
    for entry in (dense, packed):
        assert (entry.active, entry.numel, entry.shape) == (int(mask.sum()), 15, SHAPE)
        assert torch.equal(entry.mask, mask)
        assert torch.equal(entry.positions(), mask.flatten().nonzero().squeeze(1))
        assert torch.equal(entry.values(), weight[mask])
        assert torch.equal(entry.dense(), weight * mask)
        assert torch.equal(entry.collect(entry.parameter * 2), weight[mask] * 2)
        parameter, its_mask = entry
        assert parameter is entry.parameter
        assert torch.equal(its_mask, mask)
    asked = torch.tensor(positions, dtype=torch.int64)
    places = packed.places(asked)
    held = mask.flatten()[asked]
    assert torch.equal(places >= 0, held)
    assert torch.equal(packed.values()[places[held]], weight.flatten()[asked][held])


@given(mask=masks, new=masks)
def test_changes_keep_survivors(mask: Tensor, new: Tensor) -> None:
    weight = torch.arange(1.0, 16.0).view(SHAPE)
    for entry in both(weight, mask):
        entry.parameter.grad = -entry.parameter.detach().clone()
        parameter = entry.parameter
        entry.change(new)
        assert entry.parameter is parameter
        assert torch.equal(entry.mask, new)
        assert torch.equal(entry.dense(), weight * (mask & new))
        assert torch.equal(entry.expand(entry.parameter.grad), -weight * (mask & new))
        entry.write(torch.full((int(new.sum()),), 7.0, dtype=torch.float64))
        assert torch.equal(entry.dense(), 7.0 * new)
        assert entry.parameter.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resized_parameter_takes_gradients_though_an_old_graph_lives(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(5, dtype=dtype))
    earlier = (parameter * 2).sum()
    earlier.backward()
    parameter.grad = None
    resize(parameter, torch.ones(3, dtype=dtype))
    (parameter * 3).sum().backward()
    assert parameter.grad.tolist() == [3.0] * 3
    assert parameter.requires_grad
    assert parameter.is_leaf
