"""The channels of a tensor, followed through the operations that move them, for `_channel_groups`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from fedmef_fx.sparsity.granularity import Layout

__all__ = ["ChannelFlow", "LayerCall"]


@dataclasses.dataclass(frozen=True, slots=True)
class ChannelFlow:
    """The channels of a tensor: a group's number, and along which dimension they lie.

    Attributes:
        group: The number.
        channels: How many there are.
        is_last: Whether they lie along the last dimension; otherwise along dimension 1.
        rank: Number of dimensions; 0 where it is not known.
        is_flat: Whether each is several entries of the last dimension, one after the other.
    """

    group: int
    channels: int
    is_last: bool
    rank: int = 0
    is_flat: bool = False

    def permuted(self, node: fx.Node) -> "ChannelFlow | None":
        """The flow behind `x.permute(...)`; None where it lies along neither dimension, or that is not known."""
        dims = node.args[1] if len(node.args) == 2 else node.args[1:]
        if not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
            return None
        place = [dim % len(dims) for dim in dims].index(len(dims) - 1 if self.is_last else 1)
        if place not in (1, len(dims) - 1):
            return None
        return dataclasses.replace(self, is_last=place == len(dims) - 1, rank=len(dims))

    def flattened(self, options: Mapping[str, Any]) -> "ChannelFlow | None":
        """The flow behind `flatten`."""
        start, end = options.get("start_dim", 0), options.get("end_dim", -1)
        if self.is_last or end != -1 or start not in (1, 2):
            return None
        return dataclasses.replace(self, is_last=start == 1, is_flat=start == 1, rank=start + 1)

    def averaged(self, options: Mapping[str, Any]) -> "ChannelFlow | None":
        """The flow behind a mean over all spatial dimensions."""
        dims = options.get("dim", ())
        spatial = {dim % self.rank for dim in dims} if self.rank and isinstance(dims, tuple | list) else set()
        if self.is_last or spatial != set(range(2, self.rank)):
            return None
        return self if options.get("keepdim") else dataclasses.replace(self, is_last=True, rank=2)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCall:
    """A layer as a graph calls it.

    Attributes:
        weight: Its weight.
        layout: Of the weight.
        source: The channels that it reads; None where that is not known.
        groups: Of the convolution.
    """

    weight: nn.Parameter
    layout: Layout
    source: ChannelFlow | None
    groups: int
