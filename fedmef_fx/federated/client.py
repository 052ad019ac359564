"""`Client`: bytes in, local training, bytes out. What runs on a device, independent of the transport."""

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.client_state import (
    decoded_client_state,
    encoded_client_state,
    read_client_state,
    write_client_state,
)
from fedmef_fx.federated.hooks import ClientHooks
from fedmef_fx.federated.local import LocalTraining, train_locally
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.objective import LossFunction, Objective
from fedmef_fx.federated.state import ModelState, Schema, load_state, trained_names
from fedmef_fx.federated.uplink import coded_changes, coded_names
from fedmef_fx.federated.wire import decode_broadcast, encode_update
from fedmef_fx.transformation.transform import pack_weights

__all__ = ["Client"]


class Client:
    """The client side of a federation.

    Args:
        model: A transformed model, made like the server's; it is trained in place, and stored as `training` says.
        training: How to train.
        loss_fn: Mean loss of a batch of outputs and targets, or an objective.
        collate_fn: Makes a batch of items of a data set; None for what torch's loaders do.
        received: What was received in an earlier life, if anything.
        strategy: What takes part in the training, the same as the server's; None for nothing.
        models: Number of a client -> its own model, transformed for its memory; the other clients share `model`.
        states: What clients keep from round to round, from an earlier life: number of a client -> tensors by name.

    Attributes:
        received: The last broadcast, on which the next one may build; None before the first. Its masks and dense
            tensors are what a device has to keep between rounds.
        states: What the strategy keeps of each client that was served; changed only by answers that succeed.
    """

    def __init__(
        self,
        model: nn.Module,
        training: LocalTraining,
        *,
        loss_fn: LossFunction | Objective = F.cross_entropy,
        collate_fn: Collate | None = None,
        received: ModelState | None = None,
        strategy: ClientHooks | None = None,
        models: Mapping[int, nn.Module] | None = None,
        states: MutableMapping[int, dict[str, Tensor]] | None = None,
    ) -> None:
        self.received = received
        self.states = {} if states is None else states
        self._models = dict(models or {})
        if training.weight_storage == "packed":
            for each in (model, *self._models.values()):
                pack_weights(each)
        self._model = model
        self._training = training
        self._loss_fn = loss_fn
        self._collate = collate_fn
        self._strategy = strategy
        self._schema = Schema.of(model)
        self._trained = trained_names(model, self._schema.dense)

    def answer(self, message: bytes, dataset: Any, *, client: int) -> bytes:
        """Take part in one round.

        Args:
            message: The server's broadcast.
            dataset: The local data, as `run` takes them.
            client: This client's number.

        Returns:
            The update, as bytes.

        Raises:
            MissingStateError: A broadcast that builds on what this client does not have, for instance since it started
                anew without `load`; after `Server.forget` the server sends a complete one.
            WireError: A message that cannot be used.
            ConfigError: Data that cannot be trained on, or training that diverged.
        """
        task, state = decode_broadcast(
            message, self._schema, previous=self.received, takes_extras=self._strategy is not None
        )
        self.received = state
        model = self._models.get(client, self._model)
        load_state(model, state)
        kept = dict(self.states.get(client, {}))
        with _named(f"client {client}, round {task.round_index}"):
            update = train_locally(
                model,
                dataset,
                self._training,
                task=task,
                client=client,
                loss_fn=self._loss_fn,
                collate=self._collate,
                hooks=self._strategy,
                received=state,
                kept=kept,
            )
            answer = self._encoded(update, task, state, kept)
        if kept or client in self.states:
            self.states[client] = kept
        return answer

    def _encoded(self, update: Update, task: RoundTask, received: ModelState, kept: dict[str, Tensor]) -> bytes:
        """The update as bytes, with changes of weights in fewer bits where the strategy says so."""
        uplink = "exact" if self._strategy is None else self._strategy.uplink
        names = coded_names(received, self._trained, uplink) if task.asked.weights else []
        if not names:
            return encode_update(update, received=received)
        coded = coded_changes(update, received, names, uplink, kept)
        return encode_update(update, received=received, coded=coded, left_out=names)

    def save(self, path: str | Path) -> None:
        """Write what a device keeps between rounds, for another process that goes on with `load`.

        Args:
            path: The file; it is either the old one or complete.

        Raises:
            CheckpointError: The file cannot be written.
        """
        write_client_state(path, self.received, self.states)

    def load(self, path: str | Path) -> None:
        """Continue where another process called `save`. A client that does not is sent everything again.

        Args:
            path: The file.

        Raises:
            CheckpointError: A file that is missing, damaged, something else, or of another model.
        """
        self.received, states = read_client_state(path, self._schema)
        self.states.clear()
        self.states.update(states)

    def kept(self) -> bytes:
        """What `save` writes, for transports that keep it elsewhere than in a file."""
        return encoded_client_state(self.received, self.states)

    def restore(self, data: bytes) -> None:
        """Go on with what `kept` gave.

        Args:
            data: The bytes.

        Raises:
            CheckpointError: Bytes that are damaged, something else, or of another model.
        """
        self.received, states = decoded_client_state(data, self._schema, where="Client.restore")
        self.states.clear()
        self.states.update(states)


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """A block whose errors say where they happened."""
    try:
        yield
    except Exception as error:
        if where not in str(error):
            error.add_note(f"in {where}")
        raise
