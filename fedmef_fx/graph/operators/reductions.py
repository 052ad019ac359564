"""Reductions, and softmax, which divides by one."""

from typing import Any, Final

import torch
from torch import nn

from fedmef_fx.graph.operators.operator import Operator

__all__ = ["ROWS"]

_aten = torch.ops.aten


def _reduction(name: str, **facts: Any) -> Operator:
    return Operator.of_torch(name, signature=("input", "dim", "keepdim"), **facts)


def _softmax(name: str, module: type[nn.Module], derivative: Any) -> Operator:
    return Operator.of_torch(
        name,
        modules=(module,),
        options=("dim",),
        signature=("input", "dim", "dtype"),
        kind="softmax",
        keeps="output",
        in_8_bits="result",
        derivative=lambda grad, out, dim, **_: derivative(grad, out, dim, out.dtype),
    )


ROWS: Final = (
    _reduction("amax", kind="mean"),
    _reduction("amin", kind="mean"),
    _reduction("mean", kind="mean", keeps="nothing"),
    _reduction("sum", kind="sum", keeps="nothing"),
    _softmax("log_softmax", nn.LogSoftmax, _aten._log_softmax_backward_data),
    _softmax("softmax", nn.Softmax, _aten._softmax_backward_data),
)
