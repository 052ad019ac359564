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
from fedmef_fx.federated.methods.method import Method
from fedmef_fx.federated.privacy import Privacy
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server_round import ServerRound
from fedmef_fx.federated.state import ModelState
from fedmef_fx.federated.uplink import UPLINKS, Uplink

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
        uplink: How clients send what their weights changed by: `"exact"`, or `"float16"` or `"int8"` with error
            feedback.
        privacy: Clipping and noise; None for none.
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
    uplink: Uplink = "exact"
    privacy: Privacy | None = None
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
        if self.uplink not in UPLINKS:
            raise ConfigError(f"Strategy.uplink: got {self.uplink!r}; expected {' | '.join(map(repr, UPLINKS))}")
        if self.privacy is not None and not isinstance(self.aggregator, WeightedMean):
            raise ConfigError(
                f"Strategy.aggregator: got {self.aggregator!r} beside privacy, whose noise is that of a mean; expected "
                "WeightedMean()"
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
        taken = self.aggregator.combine(updates, sent)
        return taken if self.privacy is None else self.privacy.clipped(taken, sent)

    @property
    def is_private(self) -> bool:
        """See `ServerHooks`."""
        return self.privacy is not None

    def check_method(self, method: Method) -> None:
        """Refuse methods in which clients have a say in masks, where privacy is to protect these."""
        opening = method.opening
        asks = method.adjusts or (opening is not None and opening.report is not None)
        if self.privacy is not None and self.privacy.protects_masks and asks:
            raise ConfigError(
                f"Strategy.privacy: method {method.name!r} chooses masks by what clients send without noise; expected "
                "one that does not, such as 'static-random' or 'fedavg', or Privacy(protects_masks=False), which "
                "covers weights alone"
            )

    def privatized(self, averaged: ModelState, clients: int, now: ServerRound) -> ModelState:
        """See `ServerHooks.privatized`."""
        if self.privacy is None:
            return averaged
        return self.privacy.noisy(averaged, now.sent, clients, now.memory)

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
