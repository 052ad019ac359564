"""Sums and scaled tensors that are written over an operand which nothing else reads, as the graph pass proves.

They keep nothing for backward, and have the bits of torch's own.
"""

import torch
from torch import Tensor

from fedmef_fx.ops.backward import needs_backward
from fedmef_fx.ops.overridable import overridable

__all__ = ["add_over", "mul_over"]


@overridable
def add_over(x: Tensor, other: Tensor, *, is_second: bool = False) -> Tensor:
    """The sum x + other, in the memory of x where it fits there.

    Args:
        x: Any shape. Only one that nothing else reads.
        other: A shape that broadcasts with that of x.
        is_second: Whether it is the second term that nothing else reads, and in whose memory the sum is.
    """
    own, rest = (other, x) if is_second else (x, other)
    return own.add_(rest) if needs_backward(own) and _fits(own, rest) else x + other


@overridable
def mul_over(x: Tensor, factor: float) -> Tensor:
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
