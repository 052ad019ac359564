"""Channels that can only leave a model together: the dependency graph of compaction.

Every index of every dimension of a parameter is a *channel*, a node of a networkx graph; an edge ties two that
have to leave together, such as output 3 of a convolution, entry 3 of its bias, and input 3 of the layer after it. The
connected components are the units that `removal` decides about. Tensors that flow carry, per dimension, the channels
of its indices (None for a dimension that is never cut, such as the batch).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from fedmef_fx.graph.program import Region

__all__ = ["Dims", "Exit", "IntArray", "State", "Ties", "channels_in", "title"]

IntArray: TypeAlias = NDArray[np.int64]
Dims: TypeAlias = tuple[IntArray | None, ...]
State: TypeAlias = Dims | list[Any]
"""The dimensions of a tensor, or a list of states for a tuple of tensors."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exit:
    """A place where channels leave their units: a layer that mixes them into others.

    Attributes:
        node: The node that reads them.
        channels: The channels, in the order of the mixed dimension.
        kind: How what they contribute is told: "weights" (a layer's columns), "zero" (nothing but zeros may go).
        reads: The tensors that are read, with the dimension that is mixed; one of them being zero suffices.
        outputs: With kind "weights", the channels of the outputs.
        touch: With kind "weights", whether output o depends on input i, [out, in].
    """

    node: fx.Node
    channels: IntArray
    kind: str
    reads: tuple[tuple[fx.Node, int], ...]
    outputs: IntArray | None = None
    touch: NDArray[np.bool_] | None = None


@dataclasses.dataclass
class Ties:
    """The dependency graph of one traced model.

    Attributes:
        region: The model and its graph.
        shapes: Per node its shape in the example call, or a list of shapes; None for what is no tensor.
        edges: Pairs of channels that leave together: the edges of the dependency graph.
        dims: Channels of the tensors that flow, by node.
        anchors: Channel -> why it cannot leave.
        exits: Where channels leave their units.
        parameters: Identity of a parameter or buffer -> it and the channels of its dimensions.
        groups: Nodes of grouped convolutions -> channels of their inputs.
    """

    region: Region
    shapes: dict[fx.Node, Any]
    edges: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    dims: dict[fx.Node, State] = dataclasses.field(default_factory=dict)
    anchors: dict[int, str] = dataclasses.field(default_factory=dict)
    exits: list[Exit] = dataclasses.field(default_factory=list)
    parameters: dict[int, tuple[Tensor, Dims]] = dataclasses.field(default_factory=dict)
    groups: dict[fx.Node, IntArray] = dataclasses.field(default_factory=dict)
    count: int = 0

    def fresh(self, size: int) -> IntArray:
        """New channels, tied to nothing."""
        numbers = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return numbers

    def parameter(self, tensor: Tensor) -> Dims:
        """The channels of a parameter or buffer, the same for all its names; dimensions of size 1 are never cut."""
        known = self.parameters.get(id(tensor))
        if known is None:
            known = tensor, tuple(self.fresh(size) if size > 1 else None for size in tensor.shape)
            self.parameters[id(tensor)] = known
        return known[1]

    def of(self, value: object) -> Dims:
        """The channels of an argument; no dimensions for a number."""
        found = self.dims.get(value) if isinstance(value, fx.Node) else None
        return found if isinstance(found, tuple) else ()

    def shape(self, value: object) -> tuple[int, ...]:
        """The shape of an argument; empty for a number."""
        found = self.shapes.get(value) if isinstance(value, fx.Node) else None
        return tuple(found) if isinstance(found, torch.Size) else ()

    def tie(self, left: IntArray | None, right: IntArray | None, reason: str) -> IntArray | None:
        """Tie the channels of two dimensions of one size; where one is never cut, the other cannot be either.

        Returns:
            The channels of the common dimension.
        """
        if left is None or right is None:
            self.anchor(left, reason)
            self.anchor(right, reason)
            return None
        if left is not right:
            self.edges += zip(left.tolist(), right.tolist(), strict=True)
        return left

    def block(self, channels: IntArray) -> None:
        """Tie channels to each other: they leave all or none."""
        numbers = channels.ravel().tolist()
        self.edges += [(numbers[0], number) for number in numbers[1:]]

    def anchor(self, channels: IntArray | None, reason: str) -> None:
        """Keep channels for good."""
        if channels is not None:
            for number in channels.ravel().tolist():
                self.anchors.setdefault(number, reason)

    def anchor_all(self, state: object, reason: str) -> None:
        """Keep all channels of a tensor, or of a tuple of them."""
        if isinstance(state, list):
            for part in state:
                self.anchor_all(part, reason)
        elif isinstance(state, tuple):
            for channels in state:
                self.anchor(channels, reason)

    def units(self) -> IntArray:
        """The unit of each channel: the number of its connected component."""
        import networkx  # noqa: PLC0415 -- takes 0.2 s to import, which only its users should wait for

        graph: networkx.Graph[int] = networkx.Graph()
        graph.add_nodes_from(range(self.count))
        graph.add_edges_from(self.edges)
        result = np.empty(self.count, dtype=np.int64)
        for number, members in enumerate(networkx.connected_components(graph)):
            result[list(members)] = number
        return result


def channels_in(state: State) -> Sequence[IntArray]:
    """All cut dimensions in a state."""
    if isinstance(state, list):
        return [channels for part in state for channels in channels_in(part)]
    return [channels for channels in state if channels is not None]


def title(node: fx.Node) -> str:
    """How reasons name an operation."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{target} ({node.name})"
