"""Floating point tensors as unsigned integer words.

The magnitude order of IEEE floats is the order of their bit patterns without the sign bit, and a NaN has a larger
pattern than infinity. So the one integer comparison

    (word & magnitude_mask) > limit          <=>          not (|x| <= threshold)

serves float16, bfloat16, float32 and float64 alike (numpy knows no bfloat16) and keeps NaN instead of losing it.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.errors import ConfigError

__all__ = [
    "SUPPORTED_DTYPES",
    "Words",
    "check_float",
    "floats",
    "magnitude_mask",
    "nearest",
    "round_down",
    "word",
    "words",
]

Words = NDArray[np.unsignedinteger[Any]]

_INTEGERS: Final[Mapping[torch.dtype, tuple[torch.dtype, type[np.unsignedinteger[Any]]]]] = MappingProxyType(
    {
        torch.float64: (torch.int64, np.uint64),
        torch.float32: (torch.int32, np.uint32),
        torch.float16: (torch.int16, np.uint16),
        torch.bfloat16: (torch.int16, np.uint16),
    }
)
SUPPORTED_DTYPES: Final = tuple(_INTEGERS)


def check_float(dtype: torch.dtype) -> None:
    """Refuse what is not a real floating point format of 16, 32 or 64 bits.

    Raises:
        ConfigError: Another dtype.
    """
    if dtype not in _INTEGERS:
        allowed = ", ".join(str(supported).removeprefix("torch.") for supported in _INTEGERS)
        raise ConfigError(f"memory: got a tensor of {dtype}; expected one of {allowed}; keep other tensors unchanged")


def words(flat: Tensor) -> Words:
    """The memory of a CPU tensor as unsigned integers of the same width; shares memory, so writes go through.

    Args:
        flat: `[n]`, contiguous, on the CPU, of a supported dtype.
    """
    check_float(flat.dtype)
    signed, unsigned = _INTEGERS[flat.dtype]
    array: Words = flat.detach().view(signed).numpy().view(unsigned)
    return array


def floats(chunk: Words, dtype: torch.dtype) -> NDArray[np.floating[Any]]:
    """The values of some words in a format that numpy computes in: exact, and a copy for the 16-bit formats only."""
    if dtype == torch.float64:
        return chunk.view(np.float64)
    if dtype == torch.float32:
        return chunk.view(np.float32)
    if dtype == torch.float16:
        return chunk.view(np.float16).astype(np.float32)
    return (chunk.astype(np.uint32) << np.uint32(16)).view(np.float32)


def magnitude_mask(dtype: torch.dtype) -> np.unsignedinteger[Any]:
    """The word with every bit set but the sign."""
    unsigned = _INTEGERS[dtype][1]
    return unsigned(np.iinfo(unsigned).max >> 1)


@functools.lru_cache(maxsize=1024)  # a threshold serves several steps, and making a tensor of it takes long
def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of a format nearest to `value`, as torch rounds a Python number that meets a tensor."""
    return torch.tensor(value, dtype=dtype).item()


@functools.lru_cache(maxsize=1024)
def word(value: float, dtype: torch.dtype) -> np.unsignedinteger[Any]:
    """The bit pattern of `value`, rounded to nearest."""
    pattern: np.unsignedinteger[Any] = words(torch.tensor([value], dtype=dtype))[0]
    return pattern


@functools.lru_cache(maxsize=1024)
def round_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of a format that is not above `threshold`.

    `|x| > threshold` and `|x| > round_down(threshold)` agree for every x of the format; rounding to nearest could
    drop an x that lies just above the threshold.

    Raises:
        ConfigError: A negative threshold or NaN, or a dtype that is not supported.
    """
    check_float(dtype)
    if math.isnan(threshold) or threshold < 0:
        raise ConfigError(f"memory: got the threshold {threshold!r}; expected a number >= 0")
    rounded = nearest(threshold, dtype)
    if rounded <= threshold:
        return rounded
    below = torch.from_numpy((np.array([word(rounded, dtype)]) - 1).view(f"i{dtype.itemsize}"))
    return below.view(dtype).item()
