"""Models of other floats become models of float32: onnxruntime's CPU kernels know few operators for other types."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["in_float32", "other_precision", "widened"]

_OTHER: Final = (torch.bfloat16, torch.float16, torch.float64)


def other_precision(model: nn.Module) -> str:
    """The types of a model's weights other than float32, as text; empty where it has none."""
    dtypes = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in _OTHER}
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def in_float32(model: nn.Module) -> nn.Module:
    """A copy of a model with float32 weights."""
    return copy.deepcopy(model).float()


def widened(inputs: Sequence[Any], kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with their floats in float32."""
    return pytree.tree_map_only(  # type: ignore[no-any-return]  # of torch's own untyped function
        Tensor, lambda t: t.float() if t.dtype in _OTHER else t, (tuple(inputs), dict(kwargs or {}))
    )
