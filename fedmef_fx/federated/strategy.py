"""`Strategy`: who takes part in a round, how many answers it needs, and what is done with them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.limits import Limits
from fedmef_fx.federated.rounds import RoundRecord

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

    Raises:
        ConfigError: A value out of range.
    """

    clients_per_round: int | None = None
    reserves: int = 0
    minimum: int = 1
    timeout_s: float | None = None
    patience: int = 3
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name, low in (("clients_per_round", 1), ("reserves", 0), ("minimum", 1), ("patience", 1)):
            value = getattr(self, name)
            if not (type(value) is int and value >= low) and not (name == "clients_per_round" and value is None):
                raise ConfigError(f"Strategy.{name}: got {value!r}; expected an integer >= {low}")
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
        text = json.dumps(fields, default=dataclasses.asdict)
        return {"name": type(self).__name__, **json.loads(text)}
