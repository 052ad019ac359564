"""The weight a layer computes with, made from what it stores: dense, masked, or an NSConv kernel.

A layer makes it in forward and again in backward, so that no dense copy is kept in between.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedmef_fx.ops import growth
from fedmef_fx.ops.nsconv import KernelForm, nsconv_kernel, nsconv_kernel_backward

__all__ = ["StoredWeight", "effective_weight", "effective_weight_backward"]


class StoredWeight(NamedTuple):
    """What a layer stores of its weight.

    Attributes:
        weight: The parameter.
        gain: gain_i of an NSConv, [out]; None for a weight that is not standardised.
        mask: Boolean, of the weight's shape; None = all active.
        form: How an NSConv standardises.
    """

    weight: Tensor
    gain: Tensor | None
    mask: Tensor | None
    form: KernelForm = KernelForm()


def effective_weight(stored: StoredWeight) -> Tensor:
    """The dense weight to compute with; the parameter itself where nothing changes it."""
    weight, gain, mask, form = stored
    if gain is not None:
        return nsconv_kernel(weight, gain, mask, form)
    return weight if mask is None else torch.where(mask, weight, 0.0)


def effective_weight_backward(stored: StoredWeight, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the stored weight and gain from the gradient of the effective weight.

    Args:
        stored: The same as in forward.
        grad: Of the weight's shape; may be of lower precision, as under autocast.

    Returns:
        The gradient of the weight, exactly 0 where masked, and that of gain.
    """
    weight, gain, mask, form = stored
    if gain is not None:
        return nsconv_kernel_backward(weight, gain, mask, form, grad)
    grad = grad.to(weight.dtype)
    if mask is None:
        return grad, None
    growth.offer(mask, grad)
    return torch.where(mask, grad, 0.0), None
