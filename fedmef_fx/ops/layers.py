"""Convolutions and linear layers that keep a packed input for their weight gradient (FedMef, Sec. 3.3; after DropIT).

Forward is exact. Of the input x only what `packed` holds is kept; backward reads the rest as 0, so the weight gradient
is approximate (exact when nothing was dropped) while the gradients of the input and the bias are exact. The effective
weight is made again in backward instead of being kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.errors import FedmefError
from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.ops.autocast import autocast_dtype, under_autocast
from fedmef_fx.ops.backward import differentiable_once, taken
from fedmef_fx.ops.effective_weight import StoredWeight, effective_weight, recipe_of
from fedmef_fx.ops.layer_product import DenseProduct, Layer, LayerProduct, SparseProduct, sparse_way
from fedmef_fx.ops.nsconv import KernelForm, Statistics
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.ops.sparse_convolution import Geometry
from fedmef_fx.ops.sparse_ways import MakeWay, convolution_way, linear_way
from fedmef_fx.packing import KeptTensor
from fedmef_fx.packing.tracers import is_traced, weights_as_constants

__all__ = ["ConvolutionGeometry", "pruned_convolution", "pruned_linear"]


class ConvolutionGeometry(NamedTuple):
    """A convolution without its weight, of 1 to 3 spatial dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x, [N, in, *size]."""
        result: Tensor = torch.convolution(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return result

    def parameter_gradients(
        self, grad: Tensor, x: Tensor, weight: Callable[[], Tensor], *, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weight and the bias; exact in x. torch asks for the weight, for its shape."""
        gradients = self._backward(grad, x, weight(), (False, True, has_bias))
        return gradients[1], gradients[2] if has_bias else None

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """Gradient of the input; x itself is not needed, only its shape."""
        if grad.is_contiguous() and grad.numel() >= x_shape.numel():
            # torch wants an x and never looks at its values. One without memory of its own would be copied to some.
            stand_in = grad.view(-1)[: x_shape.numel()].view(x_shape)
            result: Tensor = self._backward(grad, stand_in, weight, (True, False, False))[0]
            return result
        return self._convolve_back(grad, x_shape, weight)

    def _convolve_back(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """The same as a convolution: transposed for an ordinary one, ordinary for a transposed one."""
        rest = tuple(
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                x_shape[2:], grad.shape[2:], self.stride, self.padding, self.dilation, weight.shape[2:], strict=True
            )
        )
        output_padding = (0,) * len(rest) if self.transposed else rest
        result: Tensor = torch.convolution(
            grad,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            not self.transposed,
            output_padding,
            self.groups,
        )
        return result

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the bias."""
        return grad.sum(dim=[0, *range(2, grad.dim())])

    def sparse_way(self, x: Tensor, active: int, weight_shape: torch.Size) -> MakeWay | None:
        """How it computes from so many active weights alone; None where a dense product is faster."""
        if self.transposed or self.groups != 1:
            return None
        return convolution_way(x, active, weight_shape, Geometry(self.stride, self.padding, self.dilation))

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, which: tuple[bool, bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [grad.shape[1]],
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            which,
        )


class _Linear:
    """x W^T + b over the last dimension."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def parameter_gradients(
        self, grad: Tensor, x: Tensor, weight: Callable[[], Tensor], *, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return grad_weight, self.bias_gradient(grad) if has_bias else None

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        return grad @ weight

    def bias_gradient(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    def sparse_way(self, x: Tensor, active: int, weight_shape: torch.Size) -> MakeWay | None:
        return linear_way(x, active, weight_shape)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The type a layer computes in: autocast's where it is on, else the weight's."""
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(x.device.type) or weight.dtype


class _PrunedLayer(Function):
    """A layer whose backward runs on a packed input and on a weight made anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        bias: Tensor | None,
        packed: KeptTensor | None,
        layer: Layer,
        stored: StoredWeight,
    ) -> Tensor:
        dtype = _compute_dtype(x, weight)
        ctx.layer = layer
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
            product = _product(ctx, stored, dtype)
            out = product.forward(computed, None if bias is None else bias.to(dtype))
        # Linear layers give a view for inputs of three or more dimensions, which nothing could change in place.
        return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, x = ctx.saved_tensors
        stored = StoredWeight(weight, gain, ctx.mask, ctx.form, ctx.packed_shape)
        product = _product(ctx, stored, grad.dtype)
        grad_weight = grad_gain = grad_input = grad_bias = None
        if ctx.reads_input:
            dense = taken(ctx, "packed").unpack().reshape(ctx.x_shape) if x is None else x
            dense = dense.to(grad.dtype)
            del x
            gradient, grad_bias = product.gradients(grad, dense, has_bias=ctx.needs_input_grad[3])
            del dense
            grad_weight, grad_gain = product.stored_gradients(gradient)
            del gradient
        if ctx.needs_input_grad[0]:
            grad_input = product.input_gradient(grad, ctx.x_shape).to(ctx.x_dtype)
        if ctx.needs_input_grad[3] and grad_bias is None:
            grad_bias = ctx.layer.bias_gradient(grad)
        return grad_input, grad_weight, grad_gain, grad_bias, None, None, None


def _product(ctx: Any, stored: StoredWeight, dtype: torch.dtype) -> LayerProduct:
    """Growth candidates are collected from dense gradients, which the sparse way does not make."""
    is_collecting = growth.is_collecting()
    if ctx.way is not None and not is_collecting:
        return SparseProduct(ctx.layer, stored, ctx.recipe, ctx.way)
    return DenseProduct(ctx.layer, stored, ctx.recipe, dtype, is_remade=is_collecting)


def _apply(layer: Layer, x: Tensor, packed: KeptTensor | None, bias: Tensor | None, stored: StoredWeight) -> Tensor:
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
        x, stored.weight, stored.gain, bias, packed, layer, stored
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
    return _apply(geometry, x, packed, bias, stored)


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
    return _apply(_Linear(), x, packed, bias, stored)
