"""ReLU-like activations that keep 1 bit per element instead of their result.

PyTorch's ReLU keeps its result, which is the very tensor that the next convolution keeps: while it does, pruning the
convolution's copy saves nothing.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing import GradientBits, clamp
from fedmef_fx.packing.layout import is_same_memory

__all__ = ["SignReLU", "sign_relu"]


class SignReLU(Function):
    """The backward of `sign_relu`, which `fedmef_fx.ops.rectified` looks into."""

    @staticmethod
    @writable_result
    def forward(
        ctx: Any, x: Tensor, high: float, slope: float, inplace: bool, inplace_gradient: bool, masked_later: bool
    ) -> Tensor:
        """Clamp, and keep where gradients pass."""
        ctx.high, ctx.slope, ctx.inplace_gradient, ctx.masked_later = high, slope, inplace_gradient, masked_later
        ctx.bits = None
        if slope:
            ctx.bits = None if masked_later else GradientBits.of(x > 0)
            out = F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)
        elif masked_later:
            out = _clamped(x.clamp_ if inplace else x.clamp, high)
        else:
            out, ctx.bits = clamp(x, high=high, inplace=inplace)
            out = x if is_same_memory(out, x) else out
        if out is x:
            ctx.mark_dirty(x)
        ctx.storage = out.untyped_storage()._cdata
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient where it passes."""
        if ctx.masked_later:
            return grad, None, None, None, None, None
        result = taken(ctx, "bits").apply(grad, scale_off=ctx.slope, inplace=ctx.inplace_gradient)
        return result, None, None, None, None, None


def _clamped(clamp: Callable[..., Tensor], high: float) -> Tensor:
    return clamp(0.0, None if high == math.inf else high)


@overridable
def sign_relu(
    x: Tensor,
    *,
    high: float = math.inf,
    slope: float = 0.0,
    inplace: bool = False,
    inplace_gradient: bool = False,
    masked_later: bool = False,
) -> Tensor:
    """ReLU, ReLU6 (`high=6`) or LeakyReLU (`slope > 0`), keeping 1 bit per element for its backward.

    Args:
        x: Any shape.
        high: Upper bound.
        slope: Slope below 0; only without an upper bound.
        inplace: Write into x. Only for an x that nothing else reads, as the graph pass proves.
        inplace_gradient: Backward writes into the gradient of the result. Only for one that nothing else reads.
        masked_later: The gradient of the result is already that of x, so that nothing is kept. Only for a result that a
            `max_pool` alone reads which `masks`.

    Returns:
        `min(max(x, slope * x), high)`; its gradient is exact.
    """
    if not needs_backward(x):
        return F.leaky_relu(x, slope) if slope else _clamped(x.clamp, high)
    options = (high, slope, inplace, inplace_gradient, masked_later)
    result: Tensor = SignReLU.apply(x, *options)  # type: ignore[no-untyped-call]  # torch's own
    return result
