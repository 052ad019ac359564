"""Which values of a graph carry gradients: a product keeps an operand only for the gradient of the other one."""

from typing import Final

from torch import fx

from fedmef_fx.graph.nodes import operator_at
from fedmef_fx.graph.program import Region

__all__ = ["differentiable"]

_PLAIN_ATTRIBUTES: Final = ("device", "dtype", "ndim", "shape")


def differentiable(region: Region, graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose values may carry a gradient. Inputs are taken to: whoever calls the graph decides that."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        starts = node.op == "placeholder" or _has_trainable_tensor(region, node)
        if starts or (not _cuts(region, node) and any(argument in found for argument in node.all_input_nodes)):
            found.add(node)
    return frozenset(found)


def _has_trainable_tensor(region: Region, node: fx.Node) -> bool:
    module = region.module(node)
    if module is not None:
        return any(parameter.requires_grad for parameter in module.parameters())
    tensor = region.tensor(node)
    return tensor is not None and tensor.requires_grad


def _cuts(region: Region, node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _PLAIN_ATTRIBUTES
    row = operator_at(region, node)
    return row is not None and not row.carries_gradient
