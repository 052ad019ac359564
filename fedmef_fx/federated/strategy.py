"""`Strategy`: who takes part in a round, how many answers it needs, and what is done with them."""

import dataclasses
import json
import math
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.aggregation import Aggregator, WeightedMean
from fedmef_fx.federated.limits import Limits
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.state import ModelState

if TYPE_CHECKING:
    from fedmef_fx.federated.server import Server

__all__ = ["Strategy"]


@dataclasses.dataclass(kw_only=True)
class Strategy:
    """What differs between federations of one method; subclass it and override what differs in yours.

    Attributes:
        clients_per_round: How many answers a round is after; None for all clients'.
        reserves: How many more clients are drawn, each of which is asked where another one failed, >= 0.
        minimum: How many answers a round needs, >= 1: with fewer the model stays as it was.
        timeout_s: After how many seconds an answer is too late; None for never.
        patience: After how many rounds in a row without enough answers a run ends with an error, >= 1.
        limits: What no update may exceed.
        aggregator: What becomes of updates before the method averages them.

    Raises:
        ConfigError: A value out of range.
    """

    clients_per_round: int | None = None
    reserves: int = 0
    minimum: int = 1
    timeout_s: float | None = None
    patience: int = 3
    limits: Limits = dataclasses.field(default_factory=Limits)
    aggregator: Aggregator = dataclasses.field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        for name, low in (("clients_per_round", 1), ("reserves", 0), ("minimum", 1), ("patience", 1)):
            value = getattr(self, name)
            if not (type(value) is int and value >= low) and not (name == "clients_per_round" and value is None):
                raise ConfigError(f"Strategy.{name}: got {value!r}; expected an integer >= {low}")
        if self.minimum < self.aggregator.fewest:
            raise ConfigError(
                f"Strategy.minimum: got {self.minimum}; expected at least {self.aggregator.fewest}, which "
                f"{self.aggregator!r} needs"
            )
        timeout = self.timeout_s
        is_time = isinstance(timeout, int | float) and not isinstance(timeout, bool) and 0 < timeout < math.inf
        if timeout is not None and not is_time:
            raise ConfigError(f"Strategy.timeout_s: got {timeout!r}; expected a number of seconds > 0, or None")

    def select(self, round_index: int, clients: int, *, seed: int) -> Sequence[int]:
        """The clients of a round: those that are asked, ascending, and then the reserves.

        Args:
            round_index: t.
            clients: How many clients there are.
            seed: Of this round's draw.
        """
        del round_index
        count = clients if self.clients_per_round is None else self.clients_per_round
        if count >= clients:
            return list(range(clients))
        order = torch.randperm(clients, generator=torch.Generator().manual_seed(seed)).tolist()
        return [*sorted(order[:count]), *order[count : count + self.reserves]]

    def aggregate(
        self, updates: Sequence[Update], sent: ModelState, memory: MutableMapping[str, Tensor]
    ) -> Sequence[Update]:
        """What the method averages, weighted by samples, and adjusts masks by.

        Args:
            updates: Of this round, at least `minimum`.
            sent: What the clients started from.
            memory: Tensors to remember from round to round; part of checkpoints.
        """
        del memory
        return self.aggregator.combine(updates, sent)

    def after_round(self, record: RoundRecord, server: "Server") -> bool:
        """Called with every finished round; `server.model` is the new model.

        Returns:
            Whether the run ends here.
        """
        del record, server
        return False

    def settings(self) -> dict[str, Any]:
        """What a run depends on, as JSON can hold it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        text = json.dumps(fields, default=lambda value: {"name": type(value).__name__, **dataclasses.asdict(value)})
        return {"name": type(self).__name__, **json.loads(text)}
