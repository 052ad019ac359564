"""The weight a layer computes with, made from what it stores: dense, masked, packed, or an NSConv kernel.

A layer makes it in forward and again in backward, so that no dense copy is kept in between.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.ops import packed_weight
from fedmef_fx.ops.nsconv import KernelForm, nsconv_kernel, nsconv_kernel_backward
from fedmef_fx.ops.packed_weight import Recipe
from fedmef_fx.packing.bitmap import unpack_bits

__all__ = ["Recipe", "StoredWeight", "effective_weight", "effective_weight_backward", "recipe_of"]


class StoredWeight(NamedTuple):
    """What a layer stores of its weight.

    Attributes:
        weight: The parameter: of the weight's shape, or `[active]` when packed.
        gain: gain_i of an NSConv, [out]; None for a weight that is not standardised.
        mask: Boolean, of the weight's shape; None = all active. The bitmap of the active weights when packed.
        form: How an NSConv standardises.
        packed_shape: Shape of the weight where it is stored packed; None where it is stored dense.
    """

    weight: Tensor
    gain: Tensor | None
    mask: Tensor | None
    form: KernelForm = KernelForm()
    packed_shape: torch.Size | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return self.weight.shape if self.packed_shape is None else self.packed_shape

    def as_dense(self) -> "StoredWeight":
        """The same weight as if it were stored dense, by operations that autograd can follow."""
        if self.packed_shape is None or self.mask is None:
            return self
        active = unpack_bits(self.mask, self.packed_shape.numel())
        # By places rather than torch.masked_scatter, whose gradient has a size that depends on values.
        places = (active.long().cumsum(0) - 1).clamp_min(0)
        values = self.weight if self.weight.numel() else self.weight.new_zeros(1)
        dense = torch.where(active, values[places], 0.0).view(self.packed_shape)
        return StoredWeight(dense, self.gain, active.view(self.packed_shape), self.form)


def recipe_of(stored: StoredWeight) -> Recipe | None:
    """What it takes to make an NSConv kernel again, a few kilobytes; None for other weights."""
    weight, gain, mask, form, shape = stored
    if gain is None:
        return None
    if shape is not None and mask is not None:
        return packed_weight.packed_recipe(weight, gain, mask, form, shape=shape)
    return Recipe(form.standardize(*form.dense_rows(weight, mask), gain), None)


def effective_weight(stored: StoredWeight, dtype: torch.dtype | None = None, *, recipe: Recipe | None = None) -> Tensor:
    """The dense weight to compute with; the parameter itself where nothing changes it.

    Args:
        stored: The weight.
        dtype: To compute in; None for the parameter's.
        recipe: From `recipe_of` on the same weight; None to make it here.
    """
    weight, gain, mask, form, shape = stored
    dtype = dtype or weight.dtype
    if shape is not None and mask is not None:
        return packed_weight.unpacked(weight, gain, mask, form, shape=shape, dtype=dtype, recipe=recipe)
    if gain is not None:
        return nsconv_kernel(weight, gain, mask, form, recipe and recipe.columns).to(dtype)
    return (weight if mask is None else torch.where(mask, weight, 0.0)).to(dtype)


def effective_weight_backward(
    stored: StoredWeight, grad: Tensor, *, recipe: Recipe | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the stored weight and gain from the gradient of the effective weight.

    Args:
        stored: The same as in forward.
        grad: Of the dense weight's shape; may be of lower precision, as under autocast.
        recipe: As in `effective_weight`.

    Returns:
        The gradient of the parameter, exactly 0 where masked, and that of gain.
    """
    weight, gain, mask, form, shape = stored
    if shape is not None and mask is not None:
        return packed_weight.unpacked_backward(weight, gain, mask, form, grad=grad, recipe=recipe)
    if gain is not None:
        return nsconv_kernel_backward(weight, gain, mask, form, grad, recipe and recipe.columns)
    grad = grad.to(weight.dtype)
    if mask is None:
        return grad, None
    growth.add_candidates(mask, grad)
    return torch.where(mask, grad, 0.0), None
