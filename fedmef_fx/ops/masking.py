"""The masked weight: theta where the mask is 1, exactly 0 elsewhere.

`where` is chosen over a product because inf * 0 is nan: a masked weight or gradient that overflowed stays 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.ops.backward import differentiable_once
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable

__all__ = ["masked_weight"]


class _CandidateMaskedWeight(Function):
    """The masked weight while growth candidates are collected: backward hands over the dense gradient first."""

    @staticmethod
    @writable_result
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return torch.where(mask, weight, 0.0)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        growth.add_candidates(ctx.mask, grad)
        return torch.where(ctx.mask, grad, 0.0), None


@overridable
def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """A weight with its inactive entries read as 0.

    Args:
        weight: Any shape.
        mask: Boolean, of the same shape; True = active.

    Returns:
        `weight` where `mask`, 0 elsewhere; its gradient is 0 where masked.
    """
    if mask.dtype is not torch.bool:  # of torch.nn.utils.prune, which pruned a masked layer further
        mask = mask != 0
    if growth.is_collecting():
        result: Tensor = _CandidateMaskedWeight.apply(weight, mask)  # type: ignore[no-untyped-call]  # torch's own
        return result
    return torch.where(mask, weight, 0.0)
