"""Sums and scaled tensors that are written over an operand which nothing else reads, as the graph pass proves.

They keep nothing for backward, and have the bits of torch's own.
"""

import torch
from torch import Tensor

from fedmef_fx.ops.backward import needs_backward
from fedmef_fx.ops.overridable import overridable

__all__ = ["added", "scaled"]


@overridable
def added(x: Tensor, other: Tensor) -> Tensor:
    """The sum x + other, in the memory of x where it fits there.

    Args:
        x: Any shape. Only one that nothing else reads.
        other: A shape that broadcasts with that of x.
    """
    if needs_backward(x) and _fits(x, other):
        return x.add_(other)
    return x + other


@overridable
def scaled(x: Tensor, factor: float) -> Tensor:
    """The product of x and a number, in the memory of x.

    Args:
        x: Any shape. Only one that nothing else reads.
        factor: The number.
    """
    return x.mul_(factor) if needs_backward(x) and x.is_floating_point() else x * factor


def _fits(x: Tensor, other: Tensor) -> bool:
    if torch.result_type(x, other) != x.dtype or x.device != other.device or other.dim() > x.dim():
        return False
    sizes = zip(reversed(other.shape), reversed(x.shape), strict=False)
    return all(size in (1, own) for size, own in sizes)
