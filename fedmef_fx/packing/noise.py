"""Noise for stochastic rounding, as a function of a key and a position: any order of work, any language, same bits.

The noise of elements 2j and 2j + 1 are the lower and the upper half of one 32-bit word, h(j), all arithmetic on 32-bit
unsigned integers that wrap around; k0 is the lower and k1 the upper half of the 64-bit key:

    h = j ^ k0
    h = (h ^ (h >> 16)) * 0x7FEB352D ^ k1
    h = (h ^ (h >> 15)) * 0x846CA68B
    h =  h ^ (h >> 16)

A half r of 16 bits stands for the number (r + 0.5) / 65536. The multipliers are those of Wellons' `lowbias32`.
"""

from typing import Final

import torch
from torch import Tensor

__all__ = ["NoiseStream", "noise_at", "noise_key"]

_WORD: Final = 0xFFFF_FFFF
_MASK: Final = 0xFFFF_FFFF_FFFF_FFFF


def noise_key(*numbers: int) -> int:
    """A 64-bit key from a seed and whatever else tells one use from another (Steele's SplitMix64, chained).

    Example:
        >>> noise_key(0, 1) == noise_key(0, 1), noise_key(0, 1) == noise_key(1, 0)
        (True, False)
    """
    key = 0
    for number in numbers:
        key = (key + (number & _MASK) + 0x9E37_79B9_7F4A_7C15) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
        key ^= key >> 31
    return key


class NoiseStream:
    """The keys of one place in a model, one after another.

    Args:
        seed: What tells this place from others.

    Attributes:
        draws: Keys that were taken. With the same number the same keys follow.
    """

    __slots__ = ("draws", "seed")

    def __init__(self, seed: int) -> None:
        self.seed, self.draws = seed, 0

    def next_key(self) -> int:
        """The next key; each process of a distributed training has its own."""
        self.draws += 1
        rank = torch.distributed.get_rank() if _is_distributed() else 0
        return noise_key(self.seed, self.draws, rank)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def noise_at(key: int, start: int, count: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The noise of elements `[start, start + count)`, in (0, 1).

    Args:
        key: 64 bits.
        start: Even.
        count: Number of elements.
        dtype: float32 or float64.
        device: Where.
    """
    first, pairs = start // 2, (count + 1) // 2
    word = torch.arange(first, first + pairs, device=device).to(torch.int32)  # wraps around, as all that follows
    word.bitwise_xor_(_signed(key))
    word = _folded(word, 16).mul_(_signed(0x7FEB_352D)).bitwise_xor_(_signed(key >> 32))
    word = _folded(word, 15).mul_(_signed(0x846C_A68B))
    word = _folded(word, 16)
    noise = torch.empty(pairs, 2, dtype=dtype, device=device)
    noise[:, 0] = word & 0xFFFF
    noise[:, 1] = _shifted(word, 16)
    return noise.add_(0.5).div_(65536.0).view(-1)[:count]


def _signed(word: int) -> int:
    """The signed integer with the lower 32 bits of a number: torch computes in these, with the same bits."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (word >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _folded(word: Tensor, bits: int) -> Tensor:
    return word.bitwise_xor_(_shifted(word, bits))
