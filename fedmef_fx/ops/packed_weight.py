"""A packed weight: the active values `[active]` and a bitmap of where they stand, made dense for one layer at a time.

    forward:   values --standardise, if an NSConv--> values --unpack by the bitmap--> dense weight
    backward:  dense gradient --gather by the bitmap--> gradient of the values --backward of standardising-->

All that is as large as the dense weight are the result of `unpacked` and the gradient given to `unpacked_backward`.
The equations of the NSConv are those of `ops/nsconv.py`, on packed rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.ops.nsconv import Columns, KernelForm, standardize_backward, standardized
from fedmef_fx.ops.rows import Rows, SegmentRows
from fedmef_fx.packing import backend, backend_for
from fedmef_fx.packing.backend_numpy import block_nbytes
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.registry import announce_temporary

__all__ = [
    "Recipe",
    "active_values",
    "active_values_backward",
    "gather",
    "packed_recipe",
    "unpack",
    "unpacked",
    "unpacked_backward",
]


class Recipe(NamedTuple):
    """How to standardise a packed weight, small enough to keep between forward and backward.

    Attributes:
        columns: Its statistics.
        rows: Its rows; None where they are as large as the weight, and made again.
    """

    columns: Columns
    rows: SegmentRows | None


def packed_recipe(weight: Tensor, gain: Tensor, bitmap: Tensor, form: KernelForm, *, shape: torch.Size) -> Recipe:
    """The recipe of a packed weight; arguments as in `unpacked`."""
    if has_no_values(weight):  # there are no bits that would say which row a value stands in
        columns = Columns(*weight.new_empty(5, gain.numel(), requires_grad=False).unbind())
        lengths = weight.new_empty(gain.numel(), dtype=torch.int64, requires_grad=False)
        return Recipe(columns, None if form.transposed else SegmentRows(lengths, shape.numel() // max(gain.numel(), 1)))
    rows = form.packed_rows(bitmap, shape)
    columns = form.standardize(weight.detach(), rows, gain.detach())
    return Recipe(columns, rows if isinstance(rows, SegmentRows) else None)


def _opened(recipe: Recipe, bitmap: Tensor, form: KernelForm, shape: torch.Size) -> tuple[Rows, Columns]:
    return recipe.rows or form.packed_rows(bitmap, shape), recipe.columns


def unpack(values: Tensor, bitmap: Tensor, shape: torch.Size) -> Tensor:
    """Values at the set positions of a dense tensor, 0 elsewhere.

    Args:
        values: [active].
        bitmap: uint8, one bit per element of the dense tensor in row-major order.
        shape: Of the dense tensor.
    """
    flat = values.new_empty(shape.numel())
    backend_for(flat).unpack(bitmap, values.detach().contiguous(), out=flat)
    return flat.view(shape)


def gather(dense: Tensor, bitmap: Tensor) -> Tensor:
    """The inverse of `unpack`: the values of a dense tensor at the set positions, `[active]`."""
    return backend_for(dense).gather(bitmap, dense.detach().reshape(-1))


def unpacked(
    weight: Tensor,
    gain: Tensor | None,
    bitmap: Tensor,
    form: KernelForm,
    *,
    shape: torch.Size,
    dtype: torch.dtype,
    recipe: Recipe | None = None,
) -> Tensor:
    """The dense weight to compute with.

    Args:
        weight: The active values, [active].
        gain: gain_i of an NSConv, [out]; None for a weight that is not standardised.
        bitmap: Where they stand.
        form: How an NSConv standardises.
        shape: Of the dense weight.
        dtype: Of the result.
        recipe: From `packed_recipe` on the same weight; None to make it here.
    """
    return unpack(active_values(weight, gain, bitmap, form, shape=shape, recipe=recipe).to(dtype), bitmap, shape)


def active_values(
    weight: Tensor,
    gain: Tensor | None,
    bitmap: Tensor,
    form: KernelForm,
    *,
    shape: torch.Size,
    recipe: Recipe | None = None,
) -> Tensor:
    """The active values to compute with, [active]; arguments as in `unpacked`."""
    values = weight.detach()
    if gain is None:
        return values
    if has_no_values(weight):  # there are shapes only, and no bits to look at
        return torch.empty_like(weight)
    rows, columns = _opened(recipe or packed_recipe(weight, gain, bitmap, form, shape=shape), bitmap, form, shape)
    return standardized(values, rows, columns)


def unpacked_backward(
    weight: Tensor,
    gain: Tensor | None,
    bitmap: Tensor,
    form: KernelForm,
    *,
    grad: Tensor,
    recipe: Recipe | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the active values and of gain.

    While growth candidates are collected, the gradient at inactive positions is added before it is dropped, as by
    the dense form.

    Args:
        weight: As in `unpacked`, as the next three.
        gain: gain_i, or None.
        bitmap: Where the values stand.
        form: How an NSConv standardises.
        grad: Of the dense weight's shape; may be of lower precision.
        recipe: As in `unpacked`.
    """
    shape = grad.shape
    if has_no_values(weight):
        return _shapes_backward(weight, gain, grad)
    active = gather(grad, bitmap).to(weight.dtype)
    if gain is None:
        growth.add_candidates(bitmap, grad)
        return active, None
    if growth.is_collecting():
        recipe = recipe or packed_recipe(weight, gain, bitmap, form, shape=shape)
        scale = recipe.columns.scale
        growth.add_candidates(bitmap, grad, of_parameter=lambda: _scaled(grad, scale, form))
    return active_values_backward(weight, gain, bitmap, form, shape=shape, grad=active, recipe=recipe)


def active_values_backward(
    weight: Tensor,
    gain: Tensor | None,
    bitmap: Tensor,
    form: KernelForm,
    *,
    shape: torch.Size,
    grad: Tensor,
    recipe: Recipe | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the stored values and of gain from that of `active_values`, [active]; arguments as there."""
    if gain is None:
        return grad, None
    if has_no_values(weight):
        return torch.empty_like(weight), torch.empty_like(gain)
    rows, columns = _opened(recipe or packed_recipe(weight, gain, bitmap, form, shape=shape), bitmap, form, shape)
    return standardize_backward(weight.detach(), columns, rows, grad, g=form.g)


def _shapes_backward(weight: Tensor, gain: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """`unpacked_backward` without values: makes what `gather` and `standardize_backward` make, one after the other."""
    active = torch.empty_like(weight)
    if grad.device.type == "cpu" and backend().name == "numpy":
        # The pieces of all blocks, which are joined into a tensor that exists by then.
        announce_temporary(active.numel() * grad.dtype.itemsize + block_nbytes(grad))
    if gain is None:
        return active, None
    # The native kernel makes nothing but its result; what else runs centres the values beside it.
    buffers = [torch.empty_like(weight) for _ in range(1 if backend().name == "native" else 2)]
    return buffers[-1], torch.empty_like(gain)


def _scaled(grad: Tensor, scale: Tensor, form: KernelForm) -> Tensor:
    """A dense gradient with each row multiplied by its scale."""
    return form.kernel(form.rows(grad).to(scale.dtype) * scale.unsqueeze(1), grad.shape)
