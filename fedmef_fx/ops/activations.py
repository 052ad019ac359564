"""ReLU-like activations that keep 1 bit per element instead of their result.

PyTorch's ReLU keeps its result, which is the very tensor that the next convolution keeps: while it does, pruning the
convolution's copy saves nothing.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedmef_fx.memory import Layout, backend_for
from fedmef_fx.ops.overridable import overridable

__all__ = ["sign_relu"]


class _SignReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, slope: float, inplace: bool) -> Tensor:
        layout = Layout.of(x)
        flat = layout.flatten(x)
        kernels = backend_for(x)
        if slope:
            out = F.leaky_relu_(x, slope) if inplace else F.leaky_relu(x, slope)
            # The sign survives: a leaky ReLU with a positive slope keeps it.
            ctx.bits = kernels.clamp_bits(flat, out=torch.empty_like(flat))
        else:
            out = x if inplace and flat.data_ptr() == x.data_ptr() else layout.empty(dtype=x.dtype, device=x.device)
            ctx.bits = kernels.clamp_bits(flat, out=layout.flatten(out), high=high)
        if out is x:
            ctx.mark_dirty(x)
        ctx.layout, ctx.slope = layout, slope
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        flat = ctx.layout.flatten(grad)
        result = ctx.layout.empty(dtype=grad.dtype, device=grad.device)
        backend_for(grad).mask_by_bits(ctx.bits, flat, out=ctx.layout.flatten(result), scale_off=ctx.slope)
        ctx.bits = None
        return result, None, None, None


@overridable
def sign_relu(x: Tensor, *, high: float = math.inf, slope: float = 0.0, inplace: bool = False) -> Tensor:
    """ReLU, ReLU6 (`high=6`) or LeakyReLU (`slope > 0`), keeping 1 bit per element for its backward.

    Args:
        x: Any shape.
        high: Upper bound.
        slope: Slope below 0; only without an upper bound.
        inplace: Write into x. Only for an x that nothing else reads, as the graph pass proves.

    Returns:
        `min(max(x, slope * x), high)`; its gradient is exact.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.leaky_relu(x, slope) if slope else x.clamp(0.0, None if high == math.inf else high)
    result: Tensor = _SignReLU.apply(x, high, slope, inplace)  # type: ignore[no-untyped-call]  # torch's own
    return result
