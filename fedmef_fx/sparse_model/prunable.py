"""What is known of a weight that a transformation may prune."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

from fedmef_fx.sparsity.granularity import Layout

__all__ = ["PrunableParameter", "Tier", "WeightChannels"]

Tier = Literal["graph", "module", "hook"]


@dataclasses.dataclass(frozen=True, slots=True)
class WeightChannels:
    """How the channels of a weight relate to those of others; see `passes/_channel_groups.py`.

    Attributes:
        layout: Where its channels lie.
        leader: The first weight of the group of layers that have the same channels; itself where it has its own.
        dependents: Of a leader, names of biases and running means with one entry per channel, 0 where it is off.
    """

    layout: Layout
    leader: str
    dependents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PrunableParameter:
    """One weight that a transformation may prune.

    Attributes:
        name: Its name in the original model.
        numel: Number of weights, pruned ones included.
        tier: Where it is rewritten: in a traced graph, in the graph of a single leaf module, or by hooks.
        reason: Why the tier is not a higher one, or why the parameter is left dense; empty for the graph tier.
        masked: Whether it has a mask.
        region: Path of the traced region that holds it, None outside the graph tier.
        region_modules: Number of modules with weights in that region; 1 is a leaf on its own.
        channels: What granularities coarser than single weights need to know; None with single weights.
        packed_shape: Shape of the weight where it is stored packed; None where it is stored dense.
    """

    name: str
    numel: int
    tier: Tier | None
    reason: str = ""
    masked: bool = True
    region: str | None = None
    region_modules: int = 0
    channels: WeightChannels | None = None
    packed_shape: tuple[int, ...] | None = None

    def in_group(self, names: Mapping[str, str], tensors: Collection[str]) -> "PrunableParameter":
        """The same where layers have moved.

        Args:
            names: Former names of prunable parameters -> present ones, without those that are gone.
            tensors: Names that parameters and buffers have now.
        """
        if self.channels is None:
            return self
        leader = names.get(self.channels.leader, self.name)
        dependents = self.channels.dependents if self.channels.leader in names else ()
        kept = tuple(name for name in dependents if name in tensors)
        return dataclasses.replace(self, channels=dataclasses.replace(self.channels, leader=leader, dependents=kept))
