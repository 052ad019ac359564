"""Where code of one's own takes part in a round: at the server, and at its clients. The defaults do nothing.

`Strategy` is both. A server and its clients may run in different processes, so what they share goes through messages:
tensors that the server sends along (`extras`), tensors and numbers that clients add to their updates.
"""

from collections.abc import Mapping, MutableMapping, Sequence

from torch import Tensor

from fedmef_fx.federated.local_round import LocalRound
from fedmef_fx.federated.local_training import LocalTraining
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.methods.method import Method
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound
from fedmef_fx.federated.server_round import ServerRound
from fedmef_fx.federated.state import ModelState
from fedmef_fx.federated.uplink import Uplink

__all__ = ["ClientHooks", "ServerHooks"]


class ServerHooks:
    """What a server does with updates, and what it exchanges with clients besides the model.

    Attributes:
        uplink: How clients send what their weights changed by; see `uplink`.
        is_private: Whether what single clients sent is kept from `server_step`.
    """

    uplink: Uplink = "exact"

    @property
    def is_private(self) -> bool:
        """See above."""
        return False

    def check_method(self, method: Method) -> None:
        """Refuse a method that this does not go with."""
        del method

    def privatized(self, averaged: ModelState, clients: int, now: ServerRound) -> ModelState:
        """The average as it may be known, before `server_step`.

        Args:
            averaged: The average of what `aggregate` gave.
            clients: How many updates it was made of.
            now: The round.
        """
        del clients, now
        return averaged

    def extras(self, client: int, now: ServerRound) -> Mapping[str, Tensor]:
        """Tensors that are sent to a client along with the model, by name.

        Args:
            client: Its number.
            now: The round.
        """
        del client, now
        return {}

    def expected(self, now: ServerRound) -> Mapping[str, Tensor]:
        """Tensors that every client has to add to its update, by name: in shape and dtype as those given here.

        Args:
            now: The round.
        """
        del now
        return {}

    def aggregate(
        self, updates: Sequence[Update], sent: ModelState, memory: MutableMapping[str, Tensor]
    ) -> Sequence[Update]:
        """What the method averages, weighted by samples, and adjusts masks by.

        Args:
            updates: Of this round.
            sent: What the clients started from.
            memory: Tensors to remember from round to round; part of checkpoints.
        """
        del sent, memory
        return updates

    def server_step(self, averaged: ModelState, updates: Sequence[Update], now: ServerRound) -> ModelState:
        """The new model of the server, before masks are adjusted; the default takes the average.

        Args:
            averaged: The average of what `aggregate` gave.
            updates: What the clients sent, before `aggregate`; none where it is private.
            now: The round; `now.changes(averaged)` is what server optimizers take for a gradient, with its sign turned.
        """
        del updates, now
        return averaged

    def adjust(self, after: AfterRound, policy: Adjustment) -> dict[str, int]:
        """Adjust the masks where that is due; called in every round.

        Args:
            after: The round, with the server's new model, which is changed in place.
            policy: The method's adjustment.

        Returns:
            Parameter name -> number of weights that were grown.
        """
        return policy.finish(after)


class ClientHooks:
    """What a client does in its local training.

    Attributes:
        uplink: How it sends what its weights changed by; see `uplink`.
    """

    uplink: Uplink = "exact"

    def local_training(self, training: LocalTraining, task: RoundTask, *, client: int, samples: int) -> LocalTraining:
        """How one client trains in one round, e.g. `dataclasses.replace(training, epochs=1 + client % 3)`.

        Args:
            training: What all clients were given. How weights are stored may not change.
            task: The round.
            client: The client's number.
            samples: How many samples it has.
        """
        del task, client, samples
        return training

    def before_training(self, local: LocalRound) -> None:
        """Called before the first step."""

    def before_step(self, local: LocalRound) -> None:
        """Called before every optimizer step, when the gradients are there and before they are clipped."""

    def after_training(self, local: LocalRound) -> None:
        """Called after the last step, before gradients for growth are looked for."""
