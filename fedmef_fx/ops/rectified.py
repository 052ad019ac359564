"""What the ReLU behind a tensor keeps for its own backward, and others may use: where its gradient passes."""

from typing import Any, Final, NamedTuple

from torch import Tensor

from fedmef_fx.ops.pooling import MaxPool
from fedmef_fx.ops.relu import SignReLU
from fedmef_fx.packing import GradientBits
from fedmef_fx.packing.layout import MemoryLayout

__all__ = ["Rectified", "rectified"]

# Backward nodes of views that show all elements of what they view.
_VIEWS: Final = frozenset(
    {
        "ReshapeAliasBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "SqueezeBackward2",
        "UnsqueezeBackward0",
        "ViewBackward0",
    }
)
_KEEPERS: Final[tuple[type, ...]] = (SignReLU._backward_cls, MaxPool._backward_cls)


class Rectified(NamedTuple):
    """What is kept of the result of a ReLU, or of a max pooling of one, and its form.

    Attributes:
        bits: Where its gradient passes.
        high: Upper bound.
        slope: Slope below 0.
    """

    bits: GradientBits
    high: float
    slope: float


def rectified(x: Tensor) -> Rectified | None:
    """What the `sign_relu` or `max_pool` that made x keeps until its backward, for others to use.

    Args:
        x: Its result, or a dense view of all of it, so that both have the same elements in the order of memory.

    Returns:
        None where another operation made x, or where that one keeps no such mask.
    """
    node: Any = x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    bits = getattr(node, "bits", None) if isinstance(node, _KEEPERS) else None
    if bits is None or x.numel() != bits.layout.numel or not MemoryLayout.of(x).describes(x):
        return None
    # A reshape may have copied, into another order.
    return Rectified(bits, node.high, node.slope) if x.untyped_storage()._cdata == node.storage else None
