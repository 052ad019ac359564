"""Levels that fit the values of a block: four steps of Lloyd's algorithm, in an order that kernels repeat bit for bit.

With n values x of a block, low the smallest and high the largest, every product and sum rounded one by one:

    share     = 1 / n
    centre    = sum(x share), deviation = sum(|x - centre| share) 1.2533
    levels    = the mean of centre + deviation (best levels of a normal distribution) and of even ones
    four times: thresholds halfway between levels; a level becomes sum(x share) / (count share) of the values between
                its thresholds, where there are any.

A level never leaves its thresholds, nor [low, high]: rounding cannot put levels out of order, and blocks of equal
values are exact. No sum is larger than the largest value, so that none overflows. Sums fold a block: zeros are appended
up to a power of two, and the second half is added to the first until one number is left.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmef_fx.packing.layout import on_device

__all__ = ["fit_levels", "nearest_levels", "random_levels"]

_STEPS: Final = 4
# Where half of the levels of a normal distribution with deviation 1 lie; Max (1960).
_NORMAL_LEVELS: Final[Mapping[int, tuple[float, ...]]] = MappingProxyType(
    {
        1: (0.798,),
        2: (0.453, 1.510),
        3: (0.245, 0.756, 1.344, 2.152),
        4: (0.128, 0.388, 0.657, 0.942, 1.256, 1.618, 2.069, 2.733),
    }
)
# The standard deviation of a normal distribution over its mean absolute one: sqrt(pi / 2).
_DEVIATION: Final = 1.2533141373155001


def fit_levels(x: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """The levels of blocks.

    Args:
        x: `[blocks, size]`, finite, float32 or float64.
        bits: 1 to 4.
        low: `[blocks, 1]`, the smallest values.
        high: `[blocks, 1]`, the largest values.

    Returns:
        `[blocks, 2 ** bits]`, ascending.
    """
    share = x.new_ones(()) / x.new_full((), x.shape[1])
    shares = x * share
    levels = _start(x, shares, share, bits, low, high)
    for _ in range(_STEPS):
        thresholds = _between(levels)
        cell, edges = _above(x, thresholds), torch.cat([low, thresholds, high], 1)
        for index in range(levels.shape[1]):
            inside = cell == index
            count = inside.sum(1, keepdim=True)
            mean = _folded(torch.where(inside, shares, 0.0)) / (count.to(x.dtype) * share)
            mean = torch.clamp(mean, edges[:, index : index + 1], edges[:, index + 1 : index + 2])
            levels[:, index : index + 1] = torch.where(count > 0, mean, levels[:, index : index + 1])
    return levels.add_(0.0)  # of zeros the positive one


def nearest_levels(x: Tensor, levels: Tensor) -> Tensor:
    """The number of the level nearest to each value: uint8 `[blocks, size]`."""
    return _above(x, _between(levels))


def random_levels(x: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """The number of one of the two levels around each value, see `fedmef_fx.packing.block_code`.

    Args:
        x: `[blocks, size]`.
        levels: `[blocks, at least 2]`, ascending, of its type.
        noise: Of x's shape and type, in (0, 1).

    Returns:
        uint8 `[blocks, size]`.
    """
    low = _above(x, levels[:, 1:-1])
    floor, ceiling = levels.gather(1, low.long()), levels.gather(1, low.long() + 1)
    share = torch.where(ceiling > floor, (x - floor) / (ceiling - floor), 0.0)
    return low.add_(share + noise >= 1)


def _start(x: Tensor, shares: Tensor, share: Tensor, bits: int, low: Tensor, high: Tensor) -> Tensor:
    """Halfway between the best levels of a normal distribution and even ones."""
    upper = on_device(torch.tensor(_NORMAL_LEVELS[bits], dtype=x.dtype), x.device)
    centre = torch.clamp(_folded(shares), low, high)
    deviation = _folded((x - centre).abs_() * share) * _DEVIATION
    normal = torch.clamp(centre + deviation * torch.cat([-upper.flip(0), upper]), low, high)
    places = (torch.arange(1 << bits, dtype=x.dtype, device=x.device) + 0.5) / (2 << bits)
    return (normal * 0.5 + low * 0.5) + (high - low) * places


def _between(levels: Tensor) -> Tensor:
    return levels[:, :-1] * 0.5 + levels[:, 1:] * 0.5


def _above(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many of a block's ascending thresholds each element exceeds: uint8 `[blocks, size]`."""
    count = torch.zeros_like(x, dtype=torch.uint8)
    for index in range(thresholds.shape[1]):
        count += x > thresholds[:, index : index + 1]
    return count


def _folded(x: Tensor) -> Tensor:
    """Sums of blocks `[blocks, 1]`, in the order of the module docstring."""
    half = 1 << max(x.shape[1] - 1, 0).bit_length()
    x = F.pad(x, (0, half - x.shape[1]))
    while half > 1:
        half //= 2
        x = x[:, :half] + x[:, half:]
    return x
