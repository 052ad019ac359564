"""Pooling that keeps shapes and window offsets instead of its input and 8-byte indices."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.ops.window_offsets import Window, in_parts, indices, pack_offsets, part_size
from fedmef_fx.packing import GradientBits, clamp
from fedmef_fx.packing.registry import announce

__all__ = ["MaxPool", "adaptive_avg_pool", "avg_pool", "max_pool"]

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class MaxPool(Function):
    """The backward of `max_pool`, which `fedmef_fx.ops.rectified` looks into.

    Indices into the input are recomputed from the offset of the maximum in its window, which fits in a few bits.
    """

    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, window: Window, ceil_mode: bool, relu: tuple[float, float] | None) -> Tensor:
        """Pool, and keep the offsets; of ReLUs also where gradients pass."""
        kernel, stride, padding, dilation = window
        out, index = _MAX_POOL[len(kernel)](
            x, kernel, stride, padding, dilation=dilation, ceil_mode=ceil_mode, return_indices=True
        )
        ctx.shape, ctx.window = x.shape, window
        ctx.offset = pack_offsets(index, x.shape, window)
        announce(ctx.offset, "bitmap")
        ctx.bits, ctx.storage = None, out.untyped_storage()._cdata
        if relu is not None:
            ctx.high, ctx.slope = relu
            # Of what is clamped already the result is the same.
            ctx.bits = GradientBits.of(out > 0) if ctx.slope else clamp(out, high=ctx.high, inplace=True)[1]
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, to where the maxima were."""
        dims = len(ctx.window.kernel)
        if ctx.bits is not None:
            grad = taken(ctx, "bits").apply(grad, scale_off=ctx.slope)
        result = grad.new_zeros(ctx.shape)
        parts = zip(
            indices(taken(ctx, "offset"), grad.shape, ctx.shape, ctx.window),
            in_parts(grad),
            torch.split(result, part_size(grad.shape)),
            strict=True,
        )
        for index, given, target in parts:
            target.flatten(-dims).scatter_add_(-1, index.flatten(-dims), given.contiguous().flatten(-dims))
        return result, None, None, None


class _AvgPool(Function):
    """Backward needs the shape of the input only."""

    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.shape, ctx.options = x.shape, options
        return _avg_pool(x, options)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        backward = (
            torch.ops.aten.avg_pool3d_backward if len(ctx.options[0]) == 3 else torch.ops.aten.avg_pool2d_backward
        )
        return backward(grad.contiguous(), grad.new_empty(ctx.shape), *ctx.options), None


def _avg_pool(x: Tensor, options: tuple[Any, ...]) -> Tensor:
    return (F.avg_pool3d if len(options[0]) == 3 else F.avg_pool2d)(x, *options)


class _AdaptiveAvgPool(Function):
    """Backward needs the shape of the input only."""

    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, output_size: tuple[int | None, ...]) -> Tensor:
        ctx.shape, ctx.dims = x.shape, len(output_size)
        return _adaptive_avg_pool(x, output_size)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        aten = torch.ops.aten
        backward = aten._adaptive_avg_pool3d_backward if ctx.dims == 3 else aten._adaptive_avg_pool2d_backward
        return backward(grad.contiguous(), grad.new_empty(ctx.shape)), None


def _adaptive_avg_pool(x: Tensor, output_size: tuple[int | None, ...]) -> Tensor:
    if len(output_size) == 3:
        return F.adaptive_avg_pool3d(x, output_size)
    height, width = output_size
    return F.adaptive_avg_pool2d(x, (height, width))


@overridable
def max_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool = False,
    masks: bool = False,
    high: float = math.inf,
    slope: float = 0.0,
) -> Tensor:
    """Max pooling of 1 to 3 dimensions, keeping the place in the window of each result.

    That takes 1 to 4 bits per result, one byte for windows of more than 16 elements, 4 for those of more than 256.

    Args:
        x: [N, C, *size] or [C, *size].
        kernel: Window per dimension, as the following ones.
        stride: Step.
        padding: Implicit -inf on both sides.
        dilation: Spacing in the window.
        ceil_mode: Whether sizes round up.
        masks: Whether x is the result of a ReLU, whose gradient backward works out, too, with 1 bit per result.
        high: Upper bound of that ReLU.
        slope: Its slope below 0.

    Returns:
        What torch's max pooling returns; its gradient is exact.
    """
    if not needs_backward(x):
        pooled: Tensor = _MAX_POOL[len(kernel)](x, kernel, stride, padding, dilation=dilation, ceil_mode=ceil_mode)
        return pooled
    window, relu = Window(kernel, stride, padding, dilation), (high, slope) if masks else None
    result: Tensor = MaxPool.apply(x, window, ceil_mode, relu)  # type: ignore[no-untyped-call]  # torch's
    return result


@overridable
def avg_pool(
    x: Tensor,
    *,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling of 2 or 3 dimensions that keeps no tensor.

    Args:
        x: [N, C, *size].
        kernel: Window per dimension, as the following ones.
        stride: Step.
        padding: Zeros on both sides.
        ceil_mode: Whether sizes round up.
        count_include_pad: Whether padding counts in the average.
        divisor_override: Divisor in place of the window's size.

    Returns:
        What torch's average pooling returns; its gradient is exact.
    """
    options = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if not needs_backward(x):
        return _avg_pool(x, options)
    result: Tensor = _AvgPool.apply(x, options)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return result


@overridable
def adaptive_avg_pool(x: Tensor, output_size: tuple[int | None, ...]) -> Tensor:
    """Adaptive average pooling of 2 or 3 dimensions that keeps no tensor.

    Args:
        x: [N, C, *size].
        output_size: Per dimension; None keeps a size.

    Returns:
        What torch's adaptive average pooling returns; its gradient is exact.
    """
    if not needs_backward(x):
        return _adaptive_avg_pool(x, output_size)
    result: Tensor = _AdaptiveAvgPool.apply(x, output_size)  # type: ignore[no-untyped-call]  # torch leaves it so
    return result
