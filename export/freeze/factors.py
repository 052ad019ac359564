"""Move the factors of residual sums into the layers, so that the original's forward computes what the graph computes.

`RescaleResiduals` multiplies sums by 1 / sqrt(2), which no module of the original does. Without the multiplication the
stream after a sum is sqrt(2) times as large; that is undone where a layer reads it. Per tensor, with v its value in the
graph with factors and c a constant, the graph without them computes c v:

Rules
1. `y = x * f` of a factor goes: y reads x, so c_y = c_x / f.
2. Operations that commute with a positive factor (views, poolings, ReLU, ...) and sums pass it on: c_y = c_x for all
   their tensors.
3. A layer takes any: W' = W c_y / c_x, b' = b c_y.
4. Everything else, arguments and results of the model among it, needs c = 1.

Where these cannot all hold, the factors stay, and so does the graph. Weights are scaled once, in float64.
"""

import math
import operator
from collections import defaultdict
from typing import Final

import torch
from torch import Tensor, fx

from fedmef_fx.export.freeze.weights import readers
from fedmef_fx.graph.nodes import is_layer, operator_at
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.program import Region

__all__ = ["absorb_factors"]

_FACTOR: Final = math.sqrt(0.5)
_COMMUTING_KINDS: Final = frozenset(("identity", "pool", "mean", "sum", "split", "unbind"))
_SIZES: Final = frozenset(("size", "metadata"))


class _Scales:
    """Constants of tensors that depend on each other: a forest whose edges hold quotients."""

    def __init__(self) -> None:
        self._parents: dict[object, tuple[object, float]] = {}
        self.is_possible = True

    def _root(self, tensor: object) -> tuple[object, float]:
        """The tensor that one depends on, and how much larger its constant is than that tensor's."""
        factor = 1.0
        while tensor in self._parents:
            tensor, quotient = self._parents[tensor]
            factor *= quotient
        return tensor, factor

    def tie(self, one: object, other: object, quotient: float = 1.0) -> None:
        """Demand that the constant of one tensor is a multiple of another's."""
        (root, factor), (other_root, other_factor) = self._root(one), self._root(other)
        wanted = other_factor * quotient / factor
        if root is other_root:
            self.is_possible &= math.isclose(wanted, 1.0, rel_tol=1e-9)
        elif root is _ONE:  # it stays the root
            self._parents[other_root] = (root, 1.0 / wanted)
        else:
            self._parents[root] = (other_root, wanted)

    def of(self, tensor: object) -> float:
        """The constant; what is tied to nothing keeps 1."""
        return self._root(tensor)[1]


_ONE: Final = object()


def absorb_factors(region: Region, graph: fx.Graph) -> bool:
    """Apply the rules of this module to a folded eval graph and its owner's parameters, in place.

    Returns:
        Whether no factor is left. Otherwise nothing has changed.
    """
    factors = [node for node in graph.nodes if _is_factor(node)]
    if not factors:
        return True
    scales = _Scales()
    for node in graph.nodes:
        _tie(region, node, scales)
    scaled = _scaled_tensors(region, graph, scales) if scales.is_possible else None
    if scaled is None:
        return False
    for tensor, factor in scaled.items():
        with torch.no_grad():
            tensor.copy_(tensor.double() * factor)
    for node in factors:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    return True


def _is_factor(node: fx.Node) -> bool:
    return node.target is operator.mul and len(node.args) == 2 and bool(node.args[1] == _FACTOR)


def _tie(region: Region, node: fx.Node, scales: _Scales) -> None:
    if _is_factor(node):
        scales.tie(node, node.args[0], 1.0 / _FACTOR)
        return
    if is_layer(node):
        for parameter in node.all_input_nodes[1:]:
            if region.tensor(parameter) is None:
                scales.tie(parameter, _ONE)
                scales.tie(node, _ONE)
        return
    kind = operation_of(region, node).kind
    if kind in _SIZES or node.op == "get_attr":
        return  # no tensor of the stream
    row = operator_at(region, node)
    if kind in ("add", "sub") and not node.kwargs and len(node.all_input_nodes) == 2:
        tied: list[object] = [*node.all_input_nodes]
    elif kind == "cat" or (row is not None and row.name == "stack"):
        tied = [*node.all_input_nodes]
    elif row is not None and (row.is_view or kind in _COMMUTING_KINDS or row.is_homogeneous):
        tied = [*node.all_input_nodes[:1]]
    else:
        tied = [_ONE, *node.all_input_nodes]
    for tensor in tied:
        scales.tie(node, tensor)


def _scaled_tensors(region: Region, graph: fx.Graph, scales: _Scales) -> dict[Tensor, float] | None:
    """By what each parameter is multiplied; None where two layers that share one would need different factors."""
    wanted: dict[Tensor, set[float]] = defaultdict(set)
    for node in filter(is_layer, graph.nodes):
        x, y = scales.of(node.args[0]), scales.of(node)
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        for read, factor in ((node.args[1], y / x), (bias, y)):
            tensor = region.tensor(read)
            if tensor is not None:
                wanted[tensor].add(round(factor, 12))
    shared = [tensor for tensor, factors in wanted.items() if len(factors) > 1]
    changed = [tensor for tensor, factors in wanted.items() if factors != {1.0}]
    if shared or any(not is_layer(reader) for tensor in changed for reader in readers(region, graph, tensor)):
        return None
    return {tensor: wanted[tensor].pop() for tensor in changed}
