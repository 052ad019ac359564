"""The two interfaces in which methods differ: how the first masks are found, and how masks are adjusted.

The loop is the same for all: broadcast, local training, averaging. A policy says what clients send besides their
weights (`report`, see `messages.REPORTS`), and what the server makes of it.
"""

import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.lazy_tensors import column
from fedmef_fx.federated.messages import ReportName, Update
from fedmef_fx.federated.state import ModelState

__all__ = ["Adjustment", "AfterRound", "Opening"]


class AfterRound(NamedTuple):
    """What an adjustment can look at when a round has been averaged.

    Attributes:
        model: The server's model with the averaged weights; changed in place.
        updates: What the clients of the round sent.
        counts: Parameter name -> k_l(t) of this round, whether it adjusts or not.
        is_due: Whether the round adjusts masks.
        round_index: t.
        memory: What the policy remembers from round to round; part of checkpoints.
        sent: The masks that the clients started from.
        marked: Parameter name -> flat positions of the weights that clients were told to empty, which were the k_l
            lowest of what they started from; empty where nothing is due.
    """

    model: nn.Module
    updates: Sequence[Update]
    counts: Mapping[str, int]
    is_due: bool
    round_index: int
    memory: MutableMapping[str, Tensor]
    sent: Mapping[str, Tensor]
    marked: Mapping[str, Tensor]

    @property
    def samples(self) -> list[int]:
        """The weight of each update in averages."""
        return [update.samples for update in self.updates]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adjustment:
    """How masks are adjusted; `name` is what histories call it.

    The counts k_l(t) and the rounds are those of the configuration for every method, so that methods move equally many
    weights equally often.
    """

    name: ClassVar[str] = ""
    report: ClassVar[ReportName] = "gradients"
    granularities: ClassVar[frozenset[str]] = frozenset({"weight"})

    def asks(self) -> ReportName:
        """What clients send besides weights in adjustment rounds."""
        return self.report

    def merged(self, state: ModelState, updates: Sequence[Update]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Masks and active values after a round, before adjustment: averages weighted by samples.

        Args:
            state: What the clients started from.
            updates: What they sent.
        """
        weights, own = [update.samples for update in updates], [update.values for update in updates]
        return state.masks, {name: weighted_average(column(own, name), weights) for name in state.masks}

    def finish(self, after: AfterRound) -> dict[str, int]:
        """Adjust the masks where that is due.

        Returns:
            Parameter name -> number of weights that were grown; empty where nothing was due.
        """
        raise NotImplementedError

    def settings(self) -> Any:
        """What a run depends on, as JSON can hold it."""
        return {"name": self.name, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opening:
    """How masks are found before the first round, on the dense model with all its weights active."""

    name: ClassVar[str] = ""
    report: ClassVar[ReportName | None] = None
    """What every client sends for it; None where the server needs nothing from them."""

    def masks(self, model: nn.Module, updates: Sequence[Update], *, active: int, sample: Tensor) -> dict[str, Tensor]:
        """The first masks.

        Args:
            model: The server's model, all weights active; not changed.
            updates: What the clients sent; empty where nothing was asked for.
            active: Number of weights that are active in all masks together.
            sample: An input without its batch dimension, for its shape and type.
        """
        raise NotImplementedError

    def settings(self) -> Any:
        """What a run depends on, as JSON can hold it."""
        return {"name": self.name, **dataclasses.asdict(self)}
