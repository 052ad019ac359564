"""Which values of a graph carry gradients: a product keeps an operand only for the gradient of the other one."""

import operator
from typing import Any, Final

import torch
from torch import fx

from fedmef_fx.graph.program import Region

__all__ = ["differentiable"]

_COMPARISONS: Final = (operator.eq, operator.ge, operator.gt, operator.le, operator.lt, operator.ne)
_WITHOUT_GRADIENT: Final[frozenset[Any]] = frozenset(
    {
        *_COMPARISONS,
        torch.arange,
        torch.argmax,
        torch.bernoulli,
        torch.empty_like,
        torch.full_like,
        torch.ones_like,
        torch.rand_like,
        torch.randn_like,
        torch.zeros_like,
        "argmax",
        "bernoulli",
        "bernoulli_",
        "bool",
        "detach",
        "dim",
        "eq",
        "ge",
        "gt",
        "int",
        "le",
        "long",
        "lt",
        "ne",
        "new_empty",
        "new_full",
        "new_ones",
        "new_tensor",
        "new_zeros",
        "numel",
        "size",
    }
)
_PLAIN_ATTRIBUTES: Final = ("device", "dtype", "ndim", "shape")


def differentiable(region: Region, graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose values may carry a gradient. Inputs are taken to: whoever calls the graph decides that."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        starts = node.op == "placeholder" or _has_trainable_tensor(region, node)
        if starts or (not _cuts(node) and any(argument in found for argument in node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


def _has_trainable_tensor(region: Region, node: fx.Node) -> bool:
    module = region.module(node)
    if module is not None:
        return any(parameter.requires_grad for parameter in module.parameters())
    tensor = region.tensor(node)
    return tensor is not None and tensor.requires_grad


def _cuts(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _PLAIN_ATTRIBUTES
    return node.op in ("call_function", "call_method") and node.target in _WITHOUT_GRADIENT
