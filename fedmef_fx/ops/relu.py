"""ReLU-like activations that keep 1 bit per element instead of their result.

PyTorch's ReLU keeps its result, which is the very tensor that the next convolution keeps: while it does, pruning the
convolution's copy saves nothing.
"""

import math
from typing import Any, Final, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing import GradientBits, clamp
from fedmef_fx.packing.layout import MemoryLayout, is_same_memory

__all__ = ["Rectified", "rectified", "sign_relu"]

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


class _SignReLU(Function):
    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, high: float, slope: float, inplace: bool, inplace_gradient: bool) -> Tensor:
        ctx.high, ctx.slope, ctx.inplace_gradient = high, slope, inplace_gradient
        if slope:
            ctx.bits = GradientBits.of(x > 0)
            out = F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)
        else:
            out, ctx.bits = clamp(x, high=high, inplace=inplace)
            out = x if is_same_memory(out, x) else out
        if out is x:
            ctx.mark_dirty(x)
        ctx.storage = out.untyped_storage()._cdata
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        result = taken(ctx, "bits").apply(grad, scale_off=ctx.slope, inplace=ctx.inplace_gradient)
        return result, None, None, None, None


_BACKWARD: Final[type] = _SignReLU._backward_cls


class Rectified(NamedTuple):
    """What a `sign_relu` keeps of its result, and its form.

    Attributes:
        bits: Where its gradient passes.
        high: Upper bound.
        slope: Slope below 0.
    """

    bits: GradientBits
    high: float
    slope: float


def rectified(x: Tensor) -> Rectified | None:
    """What the `sign_relu` that made x keeps until its backward, for others to use.

    Args:
        x: Its result, or a dense view of all of it, so that both have the same elements in the order of memory.

    Returns:
        None where another operation made x, or where that `sign_relu` keeps nothing.
    """
    node: Any = x.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    bits = getattr(node, "bits", None) if isinstance(node, _BACKWARD) else None
    if bits is None or x.numel() != bits.layout.numel or not MemoryLayout.of(x).describes(x):
        return None
    # A reshape may have copied, into another order.
    return Rectified(bits, node.high, node.slope) if x.untyped_storage()._cdata == node.storage else None


@overridable
def sign_relu(
    x: Tensor,
    *,
    high: float = math.inf,
    slope: float = 0.0,
    inplace: bool = False,
    inplace_gradient: bool = False,
) -> Tensor:
    """ReLU, ReLU6 (`high=6`) or LeakyReLU (`slope > 0`), keeping 1 bit per element for its backward.

    Args:
        x: Any shape.
        high: Upper bound.
        slope: Slope below 0; only without an upper bound.
        inplace: Write into x. Only for an x that nothing else reads, as the graph pass proves.
        inplace_gradient: Backward writes into the gradient of the result. Only for one that nothing else reads.

    Returns:
        `min(max(x, slope * x), high)`; its gradient is exact.
    """
    if not needs_backward(x):
        return F.leaky_relu(x, slope) if slope else x.clamp(0.0, None if high == math.inf else high)
    result: Tensor = _SignReLU.apply(x, high, slope, inplace, inplace_gradient)  # type: ignore[no-untyped-call]  # torch's own
    return result
