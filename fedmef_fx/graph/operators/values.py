"""What says something about tensors, compares them or makes new ones: gradients end there."""

import operator
from typing import Any, Final

import torch
from torch import Tensor

from fedmef_fx.graph.operators.operator import Operator

__all__ = ["ROWS"]


def _constant(name: str, *aliases: str, kind: str = "unknown", **facts: Any) -> Operator:
    return Operator.of_torch(
        name,
        *aliases,
        spaces=(operator, torch, Tensor),
        kind=kind,
        keeps="nothing",
        carries_gradient=False,
        **facts,
    )


ROWS: Final = (
    *(_constant(name) for name in ("eq", "ge", "gt", "le", "lt", "ne")),
    *(_constant(name) for name in ("bool", "int", "long")),
    *(_constant(name) for name in ("arange", "argmax", "bernoulli")),
    *(_constant(f"{name}_like") for name in ("empty", "full", "ones", "rand", "randn", "zeros")),
    *(_constant(f"new_{name}") for name in ("empty", "full", "ones", "tensor", "zeros")),
    *(
        _constant(name, kind="metadata", plumbing="fact")
        for name in ("dim", "get_device", "is_contiguous", "ndimension", "numel")
    ),
    *(_constant(name, kind="metadata", plumbing="fact") for name in ("is_complex", "is_floating_point")),
    *(_constant(name, is_sized_by_data=True) for name in ("bincount", "nonzero", "unique", "unique_consecutive")),
    *(Operator.of_torch(name, is_sized_by_data=True) for name in ("masked_select", "repeat_interleave")),
    _constant("size", kind="size", plumbing="fact"),
    Operator(name="assert", functions=(torch._assert,), keeps="nothing"),
    # An attribute is a value like these, or a view of the tensor.
    Operator(name="getattr", functions=(getattr,), keeps="nothing", plumbing="fact"),
)
