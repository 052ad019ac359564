"""ReLU-like activations that keep 1 bit per element instead of their result.

PyTorch's ReLU keeps its result, which is the very tensor that the next convolution keeps: while it does, pruning the
convolution's copy saves nothing.
"""

import math
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing import GradientBits, clamp
from fedmef_fx.packing.layout import is_same_memory

__all__ = ["sign_relu"]


class _SignReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, slope: float, inplace: bool, inplace_gradient: bool) -> Tensor:
        ctx.slope, ctx.inplace_gradient = slope, inplace_gradient
        if slope:
            ctx.bits = GradientBits.of(x > 0)
            out = F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)
        else:
            out, ctx.bits = clamp(x, high=high, inplace=inplace)
            out = x if is_same_memory(out, x) else out
        if out is x:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        result = taken(ctx, "bits").apply(grad, scale_off=ctx.slope, inplace=ctx.inplace_gradient)
        return result, None, None, None, None


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
