"""`client_app`: a ClientApp that answers with a `federated.Client`, which lives for one message."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedmef_fx.config import Config
from fedmef_fx.errors import MissingStateError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.client_data import declared_samples, opened
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.flower.node_state import ContextStore, FolderStore, NodeState, Store
from fedmef_fx.federated.flower.parcels import fields_of, packed, payload_of
from fedmef_fx.federated.hooks import ClientHooks
from fedmef_fx.federated.local import LocalTraining
from fedmef_fx.federated.methods import Method, method_of
from fedmef_fx.federated.objective import LossFunction, Objective, objective_of
from fedmef_fx.federated.preparing import example_of, prepared

__all__ = ["ClientSetup", "client_app", "replying"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ClientSetup:
    """What a node trains with; but for number and data all nodes and the server have the same.

    Attributes:
        client: The client's number, from 0; no two nodes have the same.
        data: Its data, as `federated.run` takes them.
        model: The model, made like the server's.
        config: As for `federated.run`.
        method: As for `federated.run`.
        training: How to train; None for `LocalTraining()`.
        loss_fn: Mean loss of a batch of outputs and targets.
        collate_fn: Makes a batch of items; None for what torch's loaders do.
        strategy: What takes part in the training, the same as the server's; None for nothing.
        state_dir: Where the node keeps what it has between rounds: for strategies that keep something of each client,
            so that a federation goes on in another Flower run; None for Flower's context.
    """

    client: int
    data: Any
    model: nn.Module
    config: Config | None = None
    method: str | Method = "fedmef"
    training: LocalTraining | None = None
    loss_fn: LossFunction | Objective = F.cross_entropy
    collate_fn: Collate | None = None
    strategy: ClientHooks | None = None
    state_dir: str | Path | None = None

    def made(self) -> Client:
        """The client."""
        objective = objective_of(self.loss_fn)
        example = example_of(self.model, objective, (self.data,), self.collate_fn)
        network = prepared(self.model, self.config, method_of(self.method), example=example)
        return Client(
            network,
            self.training or LocalTraining(),
            loss_fn=objective,
            collate_fn=self.collate_fn,
            strategy=self.strategy,
        )


def client_app(setup: Callable[[Context], ClientSetup]) -> ClientApp:
    """Make a ClientApp.

    It never raises: what goes wrong is told to the server, in a few words without paths.

    Args:
        setup: Called for every message with Flower's context, whose `node_config` says who the node is.

    Example:
        >>> app = client_app(lambda context: ClientSetup(  # doctest: +SKIP
        ...     client=int(context.node_config["partition-id"]), data=load(), model=build()))
    """
    app = ClientApp()

    def query(message: Message, context: Context) -> Message:
        try:
            node = setup(context)
            samples = declared_samples(node.data)
            samples = opened(node.data, collate=node.collate_fn).samples if samples is None else samples
            content = packed(client=node.client, samples=samples)
        except Exception as error:  # whatever a node's own code raises is told
            content = packed(reason=_reason(error))
        return Message(content, reply_to=message)

    def train(message: Message, context: Context) -> Message:
        try:
            node = setup(context)
            made = node.made()
        except Exception as error:  # as above
            return Message(packed(reason=_reason(error)), reply_to=message)
        store = ContextStore(context) if node.state_dir is None else FolderStore(Path(node.state_dir), node.client)
        return replying(message, made, store, data=node.data, client=node.client)

    app.query("fedmef")(query)
    app.train("fedmef")(train)
    return app


def replying(message: Message, made: Client, store: Store, *, data: Any, client: int) -> Message:
    """A client's reply to a broadcast.

    Args:
        message: The message that brought it.
        made: The client.
        store: Where it keeps what it has between rounds.
        data: Its data.
        client: Its number.
    """
    try:
        fields = fields_of(message.content)
        state = NodeState(store, made, run=str(fields["run"]), round_index=int(fields["round"]))
        try:
            answer = made.answer(payload_of(message.content), data, client=client)
        except MissingStateError:
            return Message(packed(wants="complete"), reply_to=message)
        state.keep()
        return Message(packed(answer), reply_to=message)
    except Exception as error:  # whatever a client's data and code raise ends its part alone
        return Message(packed(reason=_reason(error, client)), reply_to=message)


def _reason(error: Exception, client: int = 0) -> str:
    return Failure.of(error, round_index=0, client=client).reason
