"""Attention of other dimensions than four, which is what torch.onnx translates: [batch, heads, length, width].

1. Dimensions before the last three become one, or one is added where there are fewer than four.
2. A mask is expanded to these dimensions first.
3. The result gets the dimensions of the queries back.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FourDimensionalAttention"]

_DIMS: Final = 4


class FourDimensionalAttention(TorchFunctionMode):
    """A block in which attention is computed in four dimensions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if {query.dim(), key.dim(), value.dim()} == {_DIMS}:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    # Dimensions before the last two are those of the queries and of keys with values, broadcast.
    shapes = (query.shape[:-2], key.shape[:-2], value.shape[:-2])
    lead: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]  # of torch
    if attn_mask is not None:
        attn_mask = _in_four(attn_mask.expand(*lead, *attn_mask.shape[-2:]), lead)
    q, k, v = (_in_four(part.expand(*lead, *part.shape[-2:]), lead) for part in (query, key, value))
    result = F.scaled_dot_product_attention(q, k, v, attn_mask, *args, **kwargs)
    return result.reshape(*lead, *result.shape[-2:])


def _in_four(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    if len(lead) < _DIMS - 2:
        return tensor.reshape(*([1] * (_DIMS - 2 - len(lead))), *tensor.shape)
    return tensor.flatten(0, len(lead) - 2)
