"""Positions of a few elements of a tensor as bytes: gaps between neighbours, 7 bits per byte.

The gap before a position is the number of elements that are skipped. It is written in base 128, least significant
digit first; every byte but the last of a number has its highest bit set (LEB128). Candidates are dense enough that
nearly every gap takes one byte, a quarter of an int32 position.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from fedmef_fx.errors import WireError

__all__ = ["pack_positions", "unpack_positions"]

# Gaps up to 2^42: more than a tensor can have elements in memory, and no sum of them overflows.
_MAX_DIGITS: Final = 6


def pack_positions(positions: Tensor) -> Tensor:
    """Pack strictly ascending positions.

    Args:
        positions: int64 `[k]`, strictly ascending, >= 0.

    Returns:
        uint8, at least k bytes.
    """
    values = positions.detach().cpu().numpy()
    gaps = np.diff(values, prepend=-1) - 1
    digits = np.ones(len(gaps), dtype=np.int64)
    for count in range(1, _MAX_DIGITS):
        digits += gaps >> (7 * count) > 0
    starts = np.cumsum(digits) - digits
    packed = np.zeros(int(digits.sum()), dtype=np.uint8)
    for place in range(_MAX_DIGITS):
        present = digits > place
        follows = (digits[present] > place + 1).astype(np.int64) << 7
        packed[starts[present] + place] = (gaps[present] >> (7 * place) & 0x7F) | follows
    return torch.from_numpy(packed)


def unpack_positions(packed: Tensor, *, count: int, numel: int) -> Tensor:
    """The inverse of `pack_positions`.

    Args:
        packed: uint8, 1-D.
        count: k, the number of positions that are expected.
        numel: Number of elements of the tensor; every position is below it.

    Returns:
        int64 `[count]`, strictly ascending.

    Raises:
        WireError: Bytes that `pack_positions` does not write, another number of positions, or one out of range.
    """
    data = packed.numpy().astype(np.int64)
    ends = np.flatnonzero(data < 0x80)
    if len(ends) != count or (len(data) and data[-1] >= 0x80):
        raise WireError(f"positions: got {len(ends)} in {len(data)} bytes; expected {count} complete ones")
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > _MAX_DIGITS or bool((data[ends[digits > 1]] == 0).any()):
        raise WireError(
            f"positions: got a gap in {digits.max()} bytes; expected the shortest form, {_MAX_DIGITS} at most"
        )
    places = np.arange(len(data)) - np.repeat(starts, digits)
    gaps = np.add.reduceat((data & 0x7F) << (7 * places), starts)
    # As integers of any size: a sum of hostile gaps may not wrap around into the range.
    if sum(map(int, gaps)) + count > numel:
        raise WireError(f"positions: got one beyond the tensor; expected all below {numel}, its number of elements")
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)
