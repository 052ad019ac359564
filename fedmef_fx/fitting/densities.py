"""How much of a model a form may keep within a number of bytes.

A packed file takes n (v d + h(d)) bytes of n weights, where v are the bytes of a value and h(d) is the entropy of the
positions of active weights in bytes, and what the graph itself takes. That rest is measured once, on a file of the
untrained model. Channel masks leave n d^2 weights or so; there the number of weights after `compact` is counted.
"""

import math
from collections.abc import Callable
from typing import Final

__all__ = ["density_within", "packed_bytes"]

_HALVINGS: Final = 30
_LEAST: Final = 1e-3


def packed_bytes(weights: int, density: float, value_bytes: int) -> float:
    """What the values and positions of the active ones among some weights take."""
    inactive = 1.0 - density
    entropy = 0.0
    if 0.0 < density < 1.0:
        entropy = -(density * math.log2(density) + inactive * math.log2(inactive)) / 8
    return weights * (value_bytes * density + entropy)


def density_within(limit: float, size_at: Callable[[float], float]) -> float:
    """The largest density whose size is within a limit, found by halving; the least one where none is."""
    low, high = _LEAST, 1.0
    if size_at(high) <= limit:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size_at(middle) <= limit else (low, middle)
    return low
