"""The kernels as operators of torch (`torch.ops.fedmef_fx`), for compilers and tracers that stay in this process.

Each has a fake kernel, which says what shapes it returns, and a derivative. A compiled function that packs tensors so
calls the kernels that it calls without the compiler, and keeps as little. Outside of tracers the kernels are called
directly, which takes 20 microseconds less.

| operator                                       | returns                             | derivative with respect to |
|------------------------------------------------|-------------------------------------|----------------------------|
| `pack(x, threshold)`                           | values, bitmap                      | x, through the values      |
| `unpack(bitmap, values, numel)`                | the dense tensor                    | values                     |
| `gather(bitmap, dense, kept)`                  | values; `kept` of them, where known | dense                      |
| `clamp_bits(x, low, high)`                     | clamped tensor, where it passes     | x                          |
| `mask_by_bits(bitmap, grad, scale_off)`        | masked tensor                       | grad                       |
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fedmef_fx.packing.bitmap import bitmap_nbytes

__all__ = ["OPERATORS", "OperatorBackend", "define_operators"]

OPERATORS = ("pack", "unpack", "gather", "clamp_bits", "mask_by_bits")
"""Names in `torch.ops.fedmef_fx`."""

_ops: Any = torch.ops.fedmef_fx


class OperatorBackend:
    """`Backend` that calls operators."""

    name = "operators"

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`."""
        values, bitmap = _ops.pack(x, threshold)
        return bitmap, values

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        out.copy_(_ops.unpack(bitmap, values, out.numel()))

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`."""
        values: Tensor = _ops.gather(bitmap, dense)
        return values

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        clamped, bitmap = _ops.clamp_bits(x, low, high)
        out.copy_(clamped)
        passes: Tensor = bitmap
        return passes

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        out.copy_(_ops.mask_by_bits(bitmap, grad, scale_off))


def define_operators(kernels_for: Callable[[Tensor], Any]) -> OperatorBackend:
    """Define the operators, once in a process.

    Args:
        kernels_for: The `Backend` that computes on a tensor with values.
    """
    _define_pack(kernels_for)
    _define_unpack(kernels_for)
    _define_gather(kernels_for)
    _define_clamp_bits(kernels_for)
    _define_mask_by_bits(kernels_for)
    return OperatorBackend()


def _bitmap_of(x: Tensor) -> Tensor:
    return x.new_empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)


def _define_pack(kernels_for: Callable[[Tensor], Any]) -> None:
    @custom_op("fedmef_fx::pack", mutates_args=())
    def pack(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        bitmap, values = kernels_for(x).pack(x, threshold)
        return values, bitmap

    @pack.register_fake
    def _(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        del threshold
        return x.new_empty(torch.library.get_ctx().new_dynamic_size()), _bitmap_of(x)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.numel = inputs[0].numel()
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        (bitmap,) = ctx.saved_tensors
        return _ops.unpack(bitmap, grad.contiguous(), ctx.numel), None

    pack.register_autograd(backward, setup_context=setup)


def _define_unpack(kernels_for: Callable[[Tensor], Any]) -> None:
    @custom_op("fedmef_fx::unpack", mutates_args=())
    def unpack(bitmap: Tensor, values: Tensor, numel: int) -> Tensor:
        out = values.new_empty(numel)
        kernels_for(out).unpack(bitmap, values.contiguous(), out=out)
        return out

    @unpack.register_fake
    def _(bitmap: Tensor, values: Tensor, numel: int) -> Tensor:
        del bitmap
        return values.new_empty(numel)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.kept = inputs[1].numel()
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (bitmap,) = ctx.saved_tensors
        return None, _ops.gather(bitmap, grad.contiguous(), ctx.kept), None

    unpack.register_autograd(backward, setup_context=setup)


def _define_gather(kernels_for: Callable[[Tensor], Any]) -> None:
    @custom_op("fedmef_fx::gather", mutates_args=())
    def gather(bitmap: Tensor, dense: Tensor, kept: int | None = None) -> Tensor:
        del kept
        values: Tensor = kernels_for(dense).gather(bitmap, dense)
        return values

    @gather.register_fake
    def _(bitmap: Tensor, dense: Tensor, kept: int | None = None) -> Tensor:
        del bitmap
        return dense.new_empty(torch.library.get_ctx().new_dynamic_size() if kept is None else kept)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.numel = inputs[1].numel()
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (bitmap,) = ctx.saved_tensors
        return None, _ops.unpack(bitmap, grad.contiguous(), ctx.numel), None

    gather.register_autograd(backward, setup_context=setup)


def _define_clamp_bits(kernels_for: Callable[[Tensor], Any]) -> None:
    @custom_op("fedmef_fx::clamp_bits", mutates_args=())
    def clamp_bits(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x)
        return out, kernels_for(x).clamp_bits(x, out=out, low=low, high=high)

    @clamp_bits.register_fake
    def _(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        del low, high
        return torch.empty_like(x), _bitmap_of(x)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        del inputs
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        (bitmap,) = ctx.saved_tensors
        return _ops.mask_by_bits(bitmap, grad.contiguous(), 0.0), None, None

    clamp_bits.register_autograd(backward, setup_context=setup)


def _define_mask_by_bits(kernels_for: Callable[[Tensor], Any]) -> None:
    @custom_op("fedmef_fx::mask_by_bits", mutates_args=())
    def mask_by_bits(bitmap: Tensor, grad: Tensor, scale_off: float) -> Tensor:
        out = torch.empty_like(grad)
        kernels_for(grad).mask_by_bits(bitmap, grad, out=out, scale_off=scale_off)
        return out

    @mask_by_bits.register_fake
    def _(bitmap: Tensor, grad: Tensor, scale_off: float) -> Tensor:
        del bitmap, scale_off
        return torch.empty_like(grad)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        bitmap, _, ctx.scale_off = inputs
        ctx.save_for_backward(bitmap)

    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (bitmap,) = ctx.saved_tensors
        return None, _ops.mask_by_bits(bitmap, grad.contiguous(), ctx.scale_off), None

    mask_by_bits.register_autograd(backward, setup_context=setup)
