"""The server's part of a round: what to send to whom, averaging, and the adjustment of masks.

Knows nothing about transports: a round is `task`, one `broadcast` and one `receive` per client, `finish_round`.
"""

from collections.abc import Mapping

import torch
from torch import nn

from fedmef_fx.errors import ConfigError, WireError
from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.methods import Method
from fedmef_fx.federated.state import ModelState, Schema, load_state, read_state
from fedmef_fx.federated.wire import decode_update, encode_broadcast
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.schedule import adjustment_count, is_adjustment_round
from fedmef_fx.sparsity.sparse_gradient import average_sparse_gradients
from fedmef_fx.training.adjustment import adjust, unit_sizes

__all__ = ["Server"]


class Server:
    """The server side of a federation.

    Args:
        model: The transformed model; it is changed in place and always holds the newest weights.
        method: The policies.
        rounds: Rounds of the whole run; adjustments stop there unless the configuration says otherwise.

    Attributes:
        state: The model that is sent; its version is the number of finished rounds.
        changed: Name of each mask's parameter and each dense tensor -> the version in which it last changed.
        known: Client -> the version of the last broadcast that it is known to have.
    """

    def __init__(self, model: nn.Module, *, method: Method, rounds: int) -> None:
        if rounds < 1:
            raise ConfigError(f"Server: rounds: got {rounds}; expected an integer >= 1")
        self.model = model
        self.schema = Schema.of(model)
        self.state = read_state(model, version=0)
        self.changed = dict.fromkeys([*self.schema.masked, *self.schema.dense], 0)
        self.known: dict[int, int] = {}
        self._method = method
        self._rounds = rounds

    def restore(self, state: ModelState, *, changed: Mapping[str, int], known: Mapping[int, int]) -> None:
        """Continue from the end of an earlier round."""
        load_state(self.model, state)
        self.state, self.changed, self.known = state, dict(changed), dict(known)

    def task(self) -> RoundTask:
        """What the current round asks of every client."""
        return RoundTask(self.state.version, self._rounds, self._counts())

    def _counts(self) -> dict[str, int] | None:
        """k_l(t) of every layer in an adjustment round, None in any other."""
        config = transformation_of(self.model).config
        if self._method.adjustment == "never" or not self.state.masks:
            return None
        stop = self._rounds if config.adjustment_stop is None else config.adjustment_stop
        if not is_adjustment_round(self.state.version, interval=config.adjustment_interval, stop=stop):
            return None
        return {
            name: adjustment_count(
                active, inactive, round_index=self.state.version, stop=stop, rate=config.adjustment_rate
            )
            for name, (active, inactive) in unit_sizes(self.model).items()
        }

    def broadcast(self, client: int) -> bytes:
        """The message to one client: without what it is known to have."""
        return encode_broadcast(self.task(), self.state, changed=self.changed, known=self.known.get(client))

    def receive(self, client: int, data: bytes) -> Update:
        """Read a client's answer; from now on the client is known to have this round's broadcast.

        Raises:
            WireError: Bytes that are no answer to this round's task; the message names client and round.
        """
        try:
            update = decode_update(data, task=self.task(), sent=self.state)
        except WireError as error:
            raise WireError(f"client {client}, round {self.state.version}: {error}") from error
        self.known[client] = self.state.version
        return update

    def finish_round(self, updates: Mapping[int, Update]) -> dict[str, int]:
        """Average what the clients sent, weighted by their samples, and adjust the masks where it is due.

        The result does not depend on the order of the clients.

        Args:
            updates: Client -> its update of this round, at least one.

        Returns:
            Parameter name -> number of weights that changed places; empty outside adjustment rounds.

        Raises:
            ConfigError: No updates.
        """
        if not updates:
            raise ConfigError(f"round {self.state.version}: got no updates; expected at least one client's")
        task, version = self.task(), self.state.version + 1
        received = list(updates.values())
        weights = [update.samples for update in received]
        values = {name: weighted_average([u.values[name] for u in received], weights) for name in self.schema.masked}
        dense = {name: weighted_average([u.dense[name] for u in received], weights) for name in self.schema.dense}
        load_state(self.model, ModelState(version, self.state.masks, values, dense))
        churn = self._adjust(received, task.counts) if task.counts else {}
        self._advance(version)
        return churn

    def _adjust(self, updates: list[Update], counts: Mapping[str, int]) -> dict[str, int]:
        """Prune the lowest averaged magnitudes and grow, without effect, where the averaged gradients are largest."""
        gradients = {
            name: average_sparse_gradients([(update.gradients[name], update.samples) for update in updates])
            for name in self.schema.masked
        }
        return adjust(self.model, gradients, counts)

    def _advance(self, version: int) -> None:
        """Note which masks and dense tensors the new version changes."""
        state = read_state(self.model, version=version)
        for old, new in ((self.state.masks, state.masks), (self.state.dense, state.dense)):
            self.changed |= {name: version for name, tensor in new.items() if not torch.equal(tensor, old[name])}
        self.state = state
