"""Products of two activations, and attention, that keep their operands in few bits.

Forward is exact; the gradient of one operand is computed from what was kept of the other.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from fedmef_fx.ops.autocast import under_autocast
from fedmef_fx.ops.backward import differentiable_once, needs_backward, taken
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.keeping import value_of
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.ops.recompute import recompute
from fedmef_fx.packing import KeptTensor

__all__ = ["compressed_attention", "compressed_matmul", "compressed_mul"]


class _Product(Function):
    """a * b, or a @ b (+ bias) with operands of two or more dimensions."""

    @staticmethod
    @writable_result
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        kept_a: KeptTensor | None,
        kept_b: KeptTensor | None,
        is_matmul: bool,
    ) -> Tensor:
        keep_b, keep_a = ctx.needs_input_grad[:2]  # the gradient of one needs the other
        ctx.kept = (kept_a if keep_a else None, kept_b if keep_b else None)
        ctx.save_for_backward(a if keep_a and kept_a is None else None, b if keep_b and kept_b is None else None)
        ctx.shapes = (a.shape, b.shape, None if bias is None else bias.shape)
        ctx.dtypes = (a.dtype, b.dtype, None if bias is None else bias.dtype)
        ctx.is_matmul = is_matmul
        if not is_matmul:
            return a * b
        return torch.matmul(a, b) if bias is None else torch.addmm(bias, a, b)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept_a, kept_b = taken(ctx, "kept")
        exact_a, exact_b = ctx.saved_tensors
        gradients: list[Tensor | None] = [None, None, None]
        with under_autocast(grad.device.type, None):
            if ctx.needs_input_grad[0]:
                b = value_of(kept_b, exact_b)
                gradients[0] = grad @ b.to(grad.dtype).mT if ctx.is_matmul else grad * b
                del b
            if ctx.needs_input_grad[1]:
                a = value_of(kept_a, exact_a)
                gradients[1] = _transposed_times(a.to(grad.dtype), grad, ctx.shapes[1]) if ctx.is_matmul else grad * a
                del a
            if ctx.needs_input_grad[2]:
                gradients[2] = grad
        summed = (
            None if g is None else g.sum_to_size(shape).to(dtype)
            for g, shape, dtype in zip(gradients, ctx.shapes, ctx.dtypes, strict=True)
        )
        return (*summed, None, None, None)


def _transposed_times(a: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """The product a^T @ grad; for a matrix b the batch is summed within the product."""
    if len(shape) == 2:
        return a.reshape(-1, a.shape[-1]).t() @ grad.reshape(-1, grad.shape[-1])
    return a.mT @ grad


@overridable
def compressed_mul(a: Any, kept_a: KeptTensor | None, b: Any, kept_b: KeptTensor | None) -> Any:
    """The product a * b with broadcasting, keeping `kept_a` and `kept_b` for its backward.

    Args:
        a: Any shape; numbers are allowed.
        kept_a: a as it is kept; None keeps a itself.
        b: A shape that broadcasts with a's.
        kept_b: b as it is kept; None keeps b itself.

    Returns:
        What torch returns.
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and needs_backward(a, b)):
        return a * b
    return _Product.apply(a, b, None, kept_a, kept_b, False)  # type: ignore[no-untyped-call]  # torch's own


@overridable
def compressed_matmul(
    a: Tensor, kept_a: KeptTensor | None, b: Tensor, kept_b: KeptTensor | None, bias: Tensor | None = None
) -> Tensor:
    """The product a @ b, plus a bias as in torch.addmm, keeping `kept_a` and `kept_b` for its backward.

    Args:
        a: [..., n, k], or [k].
        kept_a: a as it is kept; None keeps a itself.
        b: [..., k, m], or [k].
        kept_b: b as it is kept; None keeps b itself.
        bias: Broadcasts to [n, m]; only for two matrices.

    Returns:
        What torch returns.
    """
    if a.dim() < 2 or b.dim() < 2:
        return recompute(torch.matmul, (a, b), (kept_a, kept_b))
    if not needs_backward(a, b, bias):
        return torch.matmul(a, b) if bias is None else torch.addmm(bias, a, b)
    result: Tensor = _Product.apply(a, b, bias, kept_a, kept_b, True)  # type: ignore[no-untyped-call]  # torch's own
    return result


@overridable
def compressed_attention(  # noqa: PLR0913 -- as many as torch's
    query: Tensor,
    kept_query: KeptTensor | None,
    key: Tensor,
    kept_key: KeptTensor | None,
    value: Tensor,
    kept_value: KeptTensor | None,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention that keeps its operands in few bits and runs again in backward.

    Neither probabilities nor the result are kept. Dropout drops the same in backward: its random state is kept, 5 kB on
    the CPU.

    Args:
        query: [..., heads, targets, size].
        kept_query: query as it is kept; None keeps query itself.
        key: [..., heads, sources, size].
        kept_key: As kept_query.
        value: [..., heads, sources, value size].
        kept_value: As kept_query.
        attn_mask: As torch's; kept as it is.
        dropout_p: Probability that an attention weight is dropped.
        is_causal: Whether targets see no later sources.
        scale: Of the products; None for 1 / sqrt(size).
        enable_gqa: Whether several heads of the query share one of the key and value.

    Returns:
        What torch returns.
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return recompute(
        functools.partial(F.scaled_dot_product_attention, **options),
        (query, key, value, attn_mask),
        (kept_query, kept_key, kept_value, None),
        is_random=dropout_p > 0,
    )
