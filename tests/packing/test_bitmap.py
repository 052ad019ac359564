import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.packing.bitmap import _pack_on_device, _unpack_on_device, count_bits


@given(st.lists(st.booleans(), max_size=70))
def test_round_trip_and_size(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    bitmap = pack_bits(mask)
    assert bitmap.dtype == torch.uint8
    assert bitmap.numel() == bitmap_nbytes(len(bits)) == -(-len(bits) // 8)
    assert torch.equal(unpack_bits(bitmap, len(bits)), mask)
    assert count_bits(bitmap.numpy()) == sum(bits)
    # What other devices run, here on the CPU.
    assert torch.equal(_pack_on_device(mask), bitmap)
    assert torch.equal(_unpack_on_device(bitmap, len(bits)), mask)


def test_bits_are_counted_without_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert count_bits(np.array([0, 1, 255, 0b1010], dtype=np.uint8)) == 11


def test_the_first_element_is_the_lowest_bit_and_spare_bits_are_zero() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 0] = mask[2, 3] = True
    assert pack_bits(mask).tolist() == [0b0000_0001, 0b0000_1000]


def test_non_contiguous_masks_are_packed_in_logical_order() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert torch.equal(unpack_bits(pack_bits(mask.t()), 6), mask.t().flatten())


def test_meaningless_input_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected torch\.bool"):
        pack_bits(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"expected torch\.uint8\[2\] for 9 elements"):
        unpack_bits(torch.zeros(1, dtype=torch.uint8), 9)
    with pytest.raises(ConfigError):
        unpack_bits(torch.zeros(2), 9)
