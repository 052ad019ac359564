"""`Strategy`: who takes part in a round, how many answers it needs, and what is done with them."""

import dataclasses
import json
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.aggregation import Aggregator, WeightedMean
from fedmef_fx.federated.hooks import ClientHooks, ServerHooks
from fedmef_fx.federated.limits import Limits
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.state import ModelState

if TYPE_CHECKING:
    from fedmef_fx.federated.server import Server

__all__ = ["Strategy"]


@dataclasses.dataclass(kw_only=True)
class Strategy(ServerHooks, ClientHooks):
    """What differs between federations of one method; subclass it and override what differs in yours.

    At the server: `select`, `extras`, `expected`, `aggregate`, `server_step`, `adjust`, `metrics`, `after_round`. At
    clients: `local_training`, `before_training`, `before_step`, `after_training`. What a subclass remembers belongs
    into the memory of `ServerRound` and `LocalRound`, not into attributes: so it is part of checkpoints.

    Attributes:
        clients_per_round: How many answers a round is after; None for all clients'.
        reserves: How many more clients are drawn, each of which is asked where another one failed, >= 0.
        minimum: How many answers a round needs, >= 1: with fewer the model stays as it was.
        timeout_s: After how many seconds an answer is too late; None for never.
        evaluate_every: After how many rounds the new model is evaluated, >= 1; after the last one always.
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
    evaluate_every: int = 1
    limits: Limits = dataclasses.field(default_factory=Limits)
    aggregator: Aggregator = dataclasses.field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        for name, low in (
            ("clients_per_round", 1),
            ("reserves", 0),
            ("minimum", 1),
            ("patience", 1),
            ("evaluate_every", 1),
        ):
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
        """See `ServerHooks.aggregate`; here what the aggregator makes of them."""
        del memory
        return self.aggregator.combine(updates, sent)

    def metrics(self, server: "Server") -> Mapping[str, float]:
        """Numbers of one's own about a finished round, by name; recorded in the history.

        Args:
            server: `server.model` is the new model.
        """
        del server
        return {}

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
        return {"name": type(self).__name__, **json.loads(json.dumps(fields, default=_described))}


def _described(value: object) -> Any:
    """What stands for an object in JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"name": type(value).__name__, **fields}
    return getattr(value, "__qualname__", type(value).__qualname__)
