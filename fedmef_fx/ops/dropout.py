"""Dropout that keeps 1 bit per element."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedmef_fx.memory import Layout, backend_for
from fedmef_fx.ops.overridable import overridable

__all__ = ["bit_dropout"]


class _BitDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        layout = Layout.of(x)
        kept = torch.empty(layout.numel, device=x.device, dtype=torch.float32).bernoulli_(1.0 - p)
        kernels = backend_for(x)
        bits, _ = kernels.pack(kept, 0.0)
        result = layout.empty(dtype=x.dtype, device=x.device)
        flat = layout.flatten(result)
        kernels.mask_by_bits(bits, layout.flatten(x), out=flat)
        ctx.bits, ctx.layout, ctx.scale = bits, layout, 0.0 if p == 1 else 1.0 / (1.0 - p)
        flat.mul_(ctx.scale)
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        result = ctx.layout.empty(dtype=grad.dtype, device=grad.device)
        flat = ctx.layout.flatten(result)
        backend_for(grad).mask_by_bits(ctx.bits, ctx.layout.flatten(grad), out=flat)
        ctx.bits = None
        return result.mul_(ctx.scale), None


@overridable
def bit_dropout(x: Tensor, *, p: float, training: bool) -> Tensor:
    """Dropout, keeping 1 bit per element for its backward.

    Args:
        x: Any shape.
        p: Probability that an element becomes 0.
        training: Whether anything is dropped.

    Returns:
        x with elements dropped and the others divided by 1 - p.
    """
    if not training or p == 0:
        return x
    result: Tensor = _BitDropout.apply(x, p)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return result
