"""Which slices of the tensors of a graph are known to be one number everywhere."""

import dataclasses
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fedmef_fx.export.compact.ties import Ties
from fedmef_fx.graph.operations import Operation

__all__ = ["FloatArray", "KnownSlices", "Slices"]

FloatArray: TypeAlias = NDArray[np.float64]
Slices: TypeAlias = tuple[FloatArray | None, ...]
"""Per dimension the constant of each index; None where none is known."""


@dataclasses.dataclass
class KnownSlices:
    """The constants of the tensors of a graph, as far as they are known.

    Attributes:
        ties: The channels.
        gone: Channel -> whether it has left.
        folded: What has been folded into the bias of each layer node.
        slices: The constants by node; sequences for nodes whose value is one.
    """

    ties: Ties
    gone: NDArray[np.bool_]
    folded: dict[fx.Node, FloatArray] = dataclasses.field(default_factory=dict)
    slices: dict[fx.Node, Any] = dataclasses.field(default_factory=dict)
    _weights: dict[fx.Node, tuple[FloatArray, NDArray[np.bool_]]] = dataclasses.field(default_factory=dict)

    def of(self, value: object, dim: int) -> FloatArray | None:
        """The constants of one dimension of an argument."""
        found = self.slices.get(value) if isinstance(value, fx.Node) else None
        return found[dim] if isinstance(found, tuple) and -len(found) <= dim < len(found) else None

    def layer(self, node: fx.Node, operation: Operation) -> tuple[FloatArray, NDArray[np.bool_]]:
        """A layer's weight summed over its kernel, [out, in], and whether an output depends on an input."""
        known = self._weights.get(node)
        if known is None:
            weight = self.ties.region.tensor(operation.options["weight"])
            assert weight is not None  # noqa: S101 -- its rule has seen it
            kernel = weight.detach().double().flatten(2) if weight.dim() > 2 else weight.detach().double().unsqueeze(2)
            if operation.is_transposed:
                kernel = kernel.transpose(0, 1)
            known = self._weights[node] = kernel.sum(2).numpy(), (kernel != 0).any(2).numpy()
        return known

    def bias(self, node: fx.Node, operation: Operation, rows: int) -> FloatArray:
        """A layer's bias with what was folded into it; zeros without one, NaN where it is computed."""
        bias = operation.options.get("bias")
        tensor = self.ties.region.tensor(bias) if bias is not None else None
        if bias is not None and tensor is None:
            return np.full(rows, np.nan)
        value = np.zeros(rows) if tensor is None else tensor.detach().double().numpy().copy()
        return value + self.folded.get(node, 0.0)
