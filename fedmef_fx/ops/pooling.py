"""Pooling that keeps shapes and window offsets instead of its input and 8-byte indices."""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing.registry import announce

__all__ = ["adaptive_avg_pool", "avg_pool", "max_pool"]

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Window(NamedTuple):
    """A pooling window, per dimension.

    Attributes:
        kernel: Its size.
        stride: Step.
        padding: Implicit -inf on both sides.
        dilation: Spacing.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def _starts(results: Tensor, axis: int, window: _Window) -> Tensor:
    """Where the windows of an axis, counted from the last, begin; shaped to broadcast over the results."""
    start = torch.arange(results.shape[axis], device=results.device) * window.stride[axis] - window.padding[axis]
    return start.view(-1, *(1,) * (-axis - 1))


class _MaxPool(Function):
    """Indices into the input are recomputed from the offset of the maximum in its window, which fits in a byte."""

    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, window: _Window, ceil_mode: bool) -> Tensor:
        kernel, stride, padding, dilation = window
        out, index = _MAX_POOL[len(kernel)](
            x, kernel, stride, padding, dilation=dilation, ceil_mode=ceil_mode, return_indices=True
        )
        ctx.shape, ctx.window = x.shape, window
        small = torch.Size(kernel).numel() <= 256
        ctx.offset = torch.empty_like(index, dtype=torch.uint8 if small else torch.int32)
        for part, target in zip(_parts(index), _parts(ctx.offset), strict=True):
            target.copy_(_offsets(part, x.shape, window))
        announce(ctx.offset, "bitmap")
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dims = len(ctx.window.kernel)
        offset = taken(ctx, "offset")
        result = grad.new_zeros(ctx.shape)
        parts = zip(_parts(offset), _parts(grad), torch.split(result, _parts_at(offset)), strict=True)
        for part, given, target in parts:
            index = _indices(part, ctx.shape, ctx.window)
            target.flatten(-dims).scatter_add_(-1, index.flatten(-dims), given.contiguous().flatten(-dims))
        return result, None, None


# Indices take 8 bytes each, so they are worked out part by part, along the first dimension.
_PART: Final = 1 << 16


def _parts_at(tensor: Tensor) -> int:
    """Size of a part along the first dimension."""
    return max(1, _PART // max(tensor[:1].numel(), 1))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, _parts_at(tensor))


def _offsets(index: Tensor, shape: torch.Size, window: _Window) -> Tensor:
    """Where in its window each maximum lies, from its index into the input's last dimensions."""
    offset = torch.zeros_like(index)
    for axis in range(-len(window.kernel), 0):
        size = shape[axis:].numel()
        coordinate = index.remainder(size).div_(max(size // shape[axis], 1), rounding_mode="floor")
        coordinate -= _starts(index, axis, window)
        offset.mul_(window.kernel[axis]).add_(coordinate.div_(window.dilation[axis], rounding_mode="floor"))
    return offset


def _indices(offset: Tensor, shape: torch.Size, window: _Window) -> Tensor:
    """The inverse of `_offsets`."""
    rest, index, place = offset.long(), torch.zeros_like(offset, dtype=torch.int64), 1
    for axis in range(-1, -len(window.kernel) - 1, -1):
        coordinate = rest.remainder(window.kernel[axis]).mul_(window.dilation[axis])
        rest = rest.div_(window.kernel[axis], rounding_mode="floor")
        index.add_((coordinate + _starts(offset, axis, window)).mul_(place))
        place *= shape[axis]
    return index


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
) -> Tensor:
    """Max pooling of 1 to 3 dimensions, keeping one byte per result (4 for windows of more than 256 elements).

    Args:
        x: [N, C, *size] or [C, *size].
        kernel: Window per dimension, as the following ones.
        stride: Step.
        padding: Implicit -inf on both sides.
        dilation: Spacing in the window.
        ceil_mode: Whether sizes round up.

    Returns:
        What torch's max pooling returns; its gradient is exact.
    """
    if not needs_backward(x):
        pooled: Tensor = _MAX_POOL[len(kernel)](x, kernel, stride, padding, dilation=dilation, ceil_mode=ceil_mode)
        return pooled
    result: Tensor = _MaxPool.apply(x, _Window(kernel, stride, padding, dilation), ceil_mode)  # type: ignore[no-untyped-call]  # torch's
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
