"""Dropout that keeps 1 bit per element."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fedmef_fx.ops.backward import differentiable_once, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing import GradientBits

__all__ = ["BitDropout", "bit_dropout"]


class _BitDropout(Function):
    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.bits = GradientBits.of(torch.empty_like(x, dtype=torch.float32).bernoulli_(1.0 - p).bool())
        ctx.scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
        kept: Tensor = ctx.bits.apply(x.detach())
        return kept.mul_(ctx.scale)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return taken(ctx, "bits").apply(grad).mul_(ctx.scale), None


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


class BitDropout(nn.Module):
    """`bit_dropout` that follows the mode of the model, in the place of an nn.Dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x, of any shape, in train mode."""
        return bit_dropout(x, p=self.p, training=self.training)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"p={self.p:g}"
