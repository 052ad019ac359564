"""Which slices of the tensors that flow are the same number everywhere, and which one.

A channel whose weights are all zero is its bias, at every position and for every input; after an activation, a norm, a
sum it is another constant. Per tensor and dimension there is one value per index: the constant, or NaN where it is not
known to be one. A channel that has left reads as 0: so it is in every sum that it took part in.
"""

import dataclasses
import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fedmef_fx.export.compact.constant_rules import RULES, can_fold
from fedmef_fx.export.compact.known_slices import FloatArray, KnownSlices, Slices
from fedmef_fx.export.compact.ties import Exit, IntArray, Ties
from fedmef_fx.graph.nodes import is_inplace, is_view
from fedmef_fx.graph.operations import operation_of

__all__ = ["Constants"]


@dataclasses.dataclass
class Constants(KnownSlices):
    """The constants of all tensors of a graph, found by one rule per kind of operation."""

    _impure: set[fx.Node] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        for node in self._graph().nodes:
            if is_inplace(self.ties.region, node) or node.target is operator.setitem:
                self._impure |= _written(self.ties, node)

    def _graph(self) -> fx.Graph:
        return next(iter(self.ties.region.graphs.values()))

    def update(self) -> None:
        """Go through the graph with what has left by now."""
        self.slices = {}
        for node in self._graph().nodes:
            found = None if node in self._impure else self._of(node)
            self.slices[node] = self._without_gone(self.ties.dims.get(node), found)

    def _of(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            tensor = self.ties.region.tensor(node)
            return None if tensor is None else self._of_parameter(node, tensor)
        operation = operation_of(self.ties.region, node)
        rule = RULES.get(operation.kind)
        return None if rule is None else rule(self, node, operation)

    def _of_parameter(self, node: fx.Node, tensor: Tensor) -> Slices | None:
        """Weights of layers are looked at by the layers; other parameters flow, as scales and positions do."""
        if not tensor.is_floating_point() or all(self._is_layer_weight(node, user) for user in node.users):
            return None
        values = tensor.detach().double()
        slices: list[FloatArray | None] = []
        for dim in range(tensor.dim()):
            rows = values.movedim(dim, 0).reshape(tensor.shape[dim], -1)
            same = (rows == rows[:, :1]).all(1) if rows.shape[1] else torch.zeros(len(rows), dtype=torch.bool)
            slices.append(torch.where(same, rows[:, 0] if rows.shape[1] else 0.0, torch.nan).numpy())
        return tuple(slices)

    def _is_layer_weight(self, node: fx.Node, user: fx.Node) -> bool:
        operation = operation_of(self.ties.region, user)
        return operation.kind in ("conv", "linear") and operation.options["weight"] is node and operation.x is not node

    def _without_gone(self, dims: Any, slices: Any) -> Any:
        if isinstance(dims, list):
            parts = slices if isinstance(slices, list) else [None] * len(dims)
            return [self._without_gone(*pair) for pair in zip(dims, parts, strict=True)]
        if not isinstance(dims, tuple):
            return slices
        given = slices if isinstance(slices, tuple) and len(slices) == len(dims) else (None,) * len(dims)
        return tuple(self._zeroed(channels, values) for channels, values in zip(dims, given, strict=True))

    def _zeroed(self, channels: IntArray | None, values: FloatArray | None) -> FloatArray | None:
        if channels is None or not self.gone[channels].any():
            return values
        values = np.full(len(channels), np.nan) if values is None else values.copy()
        values[self.gone[channels]] = 0.0
        return values

    def is_used(self, exit_: Exit) -> NDArray[np.bool_]:
        """Per channel of an exit: whether what it contributes there is neither nothing nor foldable."""
        size = len(exit_.channels)
        values = [self.of(node, dim) for node, dim in exit_.reads]
        if exit_.kind == "zero":
            used: Any = np.ones(size, dtype=np.bool_)
            for value in values:
                if value is not None:
                    used &= value != 0
            return np.asarray(used)
        assert exit_.touch is not None  # noqa: S101 -- kind "weights"
        outputs = exit_.outputs
        alive: Any = exit_.touch if outputs is None or not len(outputs) else exit_.touch[~self.gone[outputs]]
        known = values[0]
        used = alive.any(0) if len(alive) else np.zeros(size, dtype=np.bool_)
        if known is not None:
            used &= np.isnan(known) if can_fold(self.ties, exit_.node) else known != 0
        return np.asarray(used)


def _written(ties: Ties, node: fx.Node) -> set[fx.Node]:
    """What others may read after it was written in place: the tensor, and what it is a view of."""
    found: list[fx.Node] = []
    source = node.args[0] if node.args else node.kwargs.get("input")
    while isinstance(source, fx.Node):
        found.append(source)
        if not is_view(ties.region, source) or not source.args:
            break
        source = source.args[0]
    known = operation_of(ties.region, node).kind in ("elementwise", "add", "sub", "mul", "div", "identity")
    return set() if known and all(len(alias.users) == 1 for alias in found) else set(found)
