"""Smooth activations that keep their input in few bits, and functions that keep their result so.

Forward is exact. The gradient is the function's exact derivative at the kept input or result.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.keeping import encoded, value_of
from fedmef_fx.ops.named import NAMED
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.packing import KeptTensor
from fedmef_fx.packing.bit_planes import Bits

__all__ = ["compressed_activation", "compressed_result"]


class _Activation(Function):
    @staticmethod
    @writable_result
    def forward(ctx: Any, x: Tensor, kept: KeptTensor | None, function: str, options: dict[str, Any]) -> Tensor:
        ctx.kept, ctx.function, ctx.options, ctx.dtype = kept, function, options, x.dtype
        ctx.save_for_backward(x if kept is None else None)
        return NAMED[function].function(x, **options)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x = value_of(taken(ctx, "kept"), *ctx.saved_tensors)
        result = NAMED[ctx.function].derivative(grad, x.to(grad.dtype), **ctx.options)
        return result.to(ctx.dtype), None, None, None


class _Result(Function):
    @staticmethod
    @writable_result
    def forward(
        ctx: Any, x: Tensor, function: str, bits: Bits, key: int | None, options: dict[str, Any]
    ) -> tuple[Tensor, KeptTensor | None]:
        out = NAMED[function].function(x, **options)
        kept, _ = encoded(out, bits, key=key)
        ctx.kept, ctx.function, ctx.options, ctx.dtype = kept, function, options, x.dtype
        ctx.save_for_backward(out if kept is None else None)
        return out, kept

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None, None, None]:
        out = value_of(taken(ctx, "kept"), *ctx.saved_tensors)
        return NAMED[ctx.function].derivative(grad, out, **ctx.options).to(ctx.dtype), None, None, None, None


@overridable
def compressed_activation(x: Tensor, kept: KeptTensor | None, *, function: str, **options: Any) -> Tensor:
    """A smooth activation that keeps `kept` instead of x for its backward.

    Args:
        x: Any shape.
        kept: x as it is kept; None keeps x itself.
        function: Its name, that of its row: "gelu", "pow", ...
        **options: Its options in torch: `approximate`, `exponent`, ...

    Returns:
        What torch returns.
    """
    if not needs_backward(x):
        return NAMED[function].function(x, **options)
    result: Tensor = _Activation.apply(x, kept, function, options)  # type: ignore[no-untyped-call]  # torch's own
    return result


@overridable
def compressed_result(
    x: Tensor, *, function: str, bits: Bits = 8, key: int | None = None, **options: Any
) -> tuple[Tensor, KeptTensor | None]:
    """A function whose backward needs its result, which it keeps in few bits.

    Args:
        x: Any shape.
        function: Its name, that of its row: "softmax", "tanh", ...
        bits: In how many the result is kept.
        key: Of the noise of stochastic rounding; None for nearest.
        **options: Its options in torch: `dim` and `dtype` of the softmaxes.

    Returns:
        What torch returns, and how it is kept, for other operations that read it; None where nothing is, or where
        the bits would not save memory.
    """
    if not needs_backward(x):
        return NAMED[function].function(x, **options), None
    result: tuple[Tensor, KeptTensor | None] = _Result.apply(x, function, bits, key, options)  # type: ignore[no-untyped-call]  # torch's
    return result
