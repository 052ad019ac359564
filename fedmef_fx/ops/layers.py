"""Convolutions and linear layers that keep a packed input for their weight gradient (FedMef, Sec. 3.3; after DropIT).

Forward is exact. Of the input x only what `packed` holds is kept; backward reads the rest as 0, so the weight gradient
is approximate (exact when nothing was dropped) while the gradients of the input and the bias are exact. The effective
weight is made again in backward instead of being kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from fedmef_fx.errors import FedmefError
from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.ops.autocast import autocast_dtype, under_autocast
from fedmef_fx.ops.backward import differentiable_once, taken
from fedmef_fx.ops.effective_weight import Recipe, StoredWeight, effective_weight, recipe_of
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.layer_maps import ConvolutionGeometry, LinearMap
from fedmef_fx.ops.layer_product import DenseProduct, Layer, LayerProduct, SparseProduct, sparse_way
from fedmef_fx.ops.nsconv import KernelForm, Statistics
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.ops.shared_gradient import SharedGradient, Turns
from fedmef_fx.packing import KeptTensor
from fedmef_fx.packing.sample_parts import KeptSamples
from fedmef_fx.packing.tracers import is_traced, weights_as_constants

__all__ = ["ConvolutionGeometry", "pruned_convolution", "pruned_linear"]


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The type a layer computes in: autocast's where it is on, else the weight's."""
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(x.device.type) or weight.dtype


class Reuse(NamedTuple):
    """Whose memory a layer may write its results to.

    Attributes:
        input: The input's, which nothing else reads.
        gradient: That of the gradient of its result.
        shared: Where its gradient of the input meets that of the input's only other reader.
        turns: Who of the two that alone read the gradient of its result comes last.
    """

    input: bool = False
    gradient: bool = False
    shared: SharedGradient | None = None
    turns: Turns | None = None


class _PrunedLayer(Function):
    """A layer whose backward runs on a packed input and on a weight made again."""

    @staticmethod
    @writable_result
    def forward(  # noqa: PLR0917 -- torch gives them by place
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        packed: KeptTensor | None,
        layer: Layer,
        stored: StoredWeight,
        reuse: Reuse,
    ) -> Tensor:
        dtype = _compute_dtype(x, weight)
        ctx.layer, ctx.reuse = layer, reuse if any(ctx.needs_input_grad) else Reuse()
        computed = x if autocast_dtype(x.device.type) is None else x.to(dtype)
        if any(ctx.needs_input_grad):
            ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
            ctx.mask, ctx.form, ctx.packed_shape = stored.mask, stored.form, stored.packed_shape
            ctx.reads_input = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
            ctx.packed = packed if ctx.reads_input else None
            keep_input = packed is None and ctx.reads_input
            ctx.save_for_backward(weight, gain, x if keep_input else None)
        with under_autocast(x.device.type, None):
            ctx.recipe = recipe_of(stored)
            ctx.way = sparse_way(layer, stored, computed, dtype)
            product = _product(ctx, stored, dtype, ctx.recipe)
            may_write = ctx.reuse.input and computed is x and not (packed is None and ctx.reads_input)
            # Torch cannot mark a view that forward made as written to.
            inplace = may_write and not x._is_view() and _can_take_over(layer, x, stored)
            out = product.forward(computed, None if bias is None else bias.to(dtype), inplace=inplace)
        if out is x:
            ctx.mark_dirty(x)
        # Linear layers give a view for inputs of three or more dimensions, which nothing could change in place.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, x = ctx.saved_tensors
        stored = StoredWeight(weight, gain, ctx.mask, ctx.form, ctx.packed_shape)
        product = _product(ctx, stored, grad.dtype, taken(ctx, "recipe"))
        grad_weight = grad_gain = grad_input = grad_bias = None
        if ctx.reads_input:
            kept = KeptSamples(taken(ctx, "packed"), ctx.x_shape, grad.dtype) if x is None else x.to(grad.dtype)
            kept = kept.whole() if isinstance(kept, KeptSamples) and grad.device.type != "cpu" else kept
            del x
            gradient, grad_bias = product.gradients(grad, kept, has_bias=ctx.needs_input_grad[3])
            del kept
            grad_weight, grad_gain = product.stored_gradients(gradient)
            del gradient
        if ctx.needs_input_grad[3] and grad_bias is None:
            grad_bias = ctx.layer.bias_gradient(grad)
        if ctx.needs_input_grad[0]:  # last, as it may be written over that of the result
            grad_input = _input_gradient(ctx, product, grad, stored)
        return grad_input, grad_weight, grad_gain, grad_bias, None, None, None, None


def _input_gradient(ctx: Any, product: LayerProduct, grad: Tensor, stored: StoredWeight) -> Tensor | None:
    """Gradient of the input; None where it was added to that of the input's other reader."""
    shared = ctx.reuse.shared if grad.dtype == ctx.x_dtype and grad.device.type == "cpu" else None
    total = None if shared is None else shared.take()
    if total is not None:
        product.add_input_gradient(grad, total)
        return None
    is_ours = ctx.reuse.gradient or (ctx.reuse.turns is not None and ctx.reuse.turns.is_last())
    inplace = is_ours and grad.shape == ctx.x_shape and _can_take_over(ctx.layer, grad, stored)
    result = product.input_gradient(grad, ctx.x_shape, inplace=inplace).to(ctx.x_dtype)
    if shared is not None:
        shared.leave(result)
    return result


def _can_take_over(layer: Layer, batch: Tensor, stored: StoredWeight) -> bool:
    """Whether what a layer makes of a batch could be written over it, sample by sample."""
    is_plain = batch.device.type == "cpu" and batch.is_contiguous()
    return is_plain and layer.keeps_shape(batch.shape, stored.shape)


def _product(ctx: Any, stored: StoredWeight, dtype: torch.dtype, recipe: Recipe | None) -> LayerProduct:
    """Growth candidates are collected from dense gradients, which the sparse way does not make."""
    is_collecting = growth.is_collecting()
    if ctx.way is not None and not is_collecting:
        return SparseProduct(ctx.layer, stored, recipe, ctx.way)
    return DenseProduct(ctx.layer, stored, recipe, dtype, is_remade=is_collecting)


def _apply(
    layer: Layer,
    x: Tensor,
    packed: KeptTensor | None,
    bias: Tensor | None,
    stored: StoredWeight,
    reuse: Reuse = Reuse(),  # noqa: B008 -- it is immutable
) -> Tensor:
    if x.is_complex() or stored.weight.is_complex():  # nothing here compresses complex numbers
        return layer.forward(x, effective_weight(stored), bias)
    if not x.is_floating_point():
        raise FedmefError(
            f"a layer with weight {tuple(stored.shape)} got an input of {x.dtype}; expected a floating point "
            f"tensor: convert it first, e.g. x.to({stored.weight.dtype})"
        )
    if is_traced():
        return _recorded(layer, x, bias, stored)
    result: Tensor = _PrunedLayer.apply(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        x, stored.weight, stored.gain, bias, packed, layer, stored, reuse
    )
    return result


def _recorded(layer: Layer, x: Tensor, bias: Tensor | None, stored: StoredWeight) -> Tensor:
    """The layer for who traces it: operations of torch alone, which keep what torch keeps."""
    dtype = _compute_dtype(x, stored.weight)
    computed = x if autocast_dtype(x.device.type) is None else x.to(dtype)
    with under_autocast(x.device.type, None):
        with weights_as_constants():
            weight = effective_weight(stored.as_dense(), dtype)
        return layer.forward(computed, weight, None if bias is None else bias.to(dtype))


@overridable
def pruned_convolution(  # noqa: PLR0913 -- a convolution has this many
    x: Tensor,
    packed: KeptTensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
    transposed: bool = False,
    output_padding: tuple[int, ...] = (0,),
    g: float = 1.0,
    statistics: Statistics = "active",
    packed_shape: tuple[int, ...] | None = None,
    over_input: bool = False,
    over_gradient: bool = False,
    shared: SharedGradient | None = None,
    turns: Turns | None = None,
) -> Tensor:
    """A convolution of 1 to 3 dimensions that keeps `packed` instead of x for its backward.

    Args:
        x: [N, in, *size] or [in, *size].
        packed: x as it is kept; None keeps x itself.
        weight: [out, in/groups, *kernel], or [in, out/groups, *kernel] when transposed; [active] when packed.
        bias: [out].
        gain: gain_i of an NSConv, [out]; None for an ordinary weight.
        mask: Boolean, of the weight's shape; the bitmap of the active weights when packed.
        stride: Per spatial dimension, as the following ones.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel.
        groups: Groups.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution.
        g: Gain of the nonlinearity that follows an NSConv.
        statistics: Of an NSConv.
        packed_shape: Shape of the dense weight where the weight is stored packed; None where it is stored dense.
        over_input: The result may be written over x, where it has its shape. Only for an x that nothing else reads.
        over_gradient: Backward may write over the gradient of the result. Only for one that nothing else reads.
        shared: Where the gradient of x meets that of its only other reader, if that is a convolution as well.
        turns: As `over_gradient` for a gradient that just two convolutions read: the last one may write over it.

    Returns:
        [N, out, *size]; the gradient of weight is exactly 0 where masked.

    Raises:
        FedmefError: x is not floating point.
    """
    shape = None if packed_shape is None else torch.Size(packed_shape)
    stored = StoredWeight(weight, gain, mask, KernelForm(g, groups, transposed, statistics), shape)
    dims = len(stored.shape) - 2
    output_padding = output_padding if len(output_padding) == dims else output_padding * dims
    geometry = ConvolutionGeometry(stride, padding, dilation, transposed, output_padding, groups)
    if x.dim() == dims + 1:  # without a batch dimension; the packed elements are the same
        return _apply(geometry, x.unsqueeze(0), packed, bias, stored).squeeze(0)
    return _apply(geometry, x, packed, bias, stored, Reuse(over_input, over_gradient, shared, turns))


@overridable
def pruned_linear(
    x: Tensor,
    packed: KeptTensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    g: float = 1.0,
    statistics: Statistics = "active",
    packed_shape: tuple[int, ...] | None = None,
) -> Tensor:
    """A linear layer that keeps `packed` instead of x for its backward.

    Args:
        x: [..., in].
        packed: x as it is kept; None keeps x itself.
        weight: [out, in]; [active] when packed.
        bias: [out].
        gain: gain_i of a standardised weight, [out]; None for an ordinary weight.
        mask: Boolean, of the weight's shape; the bitmap of the active weights when packed.
        g: Gain of the nonlinearity that follows a standardised weight.
        statistics: Of a standardised weight.
        packed_shape: Shape of the dense weight where the weight is stored packed; None where it is stored dense.

    Returns:
        [..., out]; the gradient of weight is exactly 0 where masked.

    Raises:
        FedmefError: x is not floating point.
    """
    shape = None if packed_shape is None else torch.Size(packed_shape)
    stored = StoredWeight(weight, gain, mask, KernelForm(g, statistics=statistics), shape)
    return _apply(LinearMap(), x, packed, bias, stored)
