"""A process that serves clients: jobs come through a pipe, answers go back through it."""

import contextlib
import dataclasses
import pickle
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.hooks import ClientHooks
from fedmef_fx.federated.local import LocalTraining
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.state import Schema
from fedmef_fx.federated.wire import decode_broadcast

__all__ = ["READY", "Crew", "Job", "Outcome", "serve"]

READY = "ready"
"""The first thing that a process sends, once it has all it needs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crew:
    """What every process of a run is given when it starts.

    Attributes:
        network: A transformed model.
        training: How to train.
        objective: What is minimised, and measured.
        collate: Makes a batch of items; None for what torch's loaders do.
        datasets: The data of all clients.
        strategy: What takes part in the training; None for nothing.
        models: Number of a client -> its own model, see `Client`.
        threads: How many threads torch computes with: results depend on it in their last bits.
    """

    network: nn.Module
    training: LocalTraining
    objective: Objective
    collate: Collate | None
    datasets: Sequence[Any]
    strategy: ClientHooks | None
    threads: int
    models: Mapping[int, nn.Module] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One client's part of a round.

    Attributes:
        client: Its number.
        message: The broadcast.
        kept: What the strategy keeps of the client.
        base: A complete broadcast of the same round, where the process lacks what the message builds on.
    """

    client: int
    message: bytes
    kept: Mapping[str, Tensor]
    base: bytes | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job.

    Attributes:
        answer: The update; None where the client failed.
        kept: What the strategy keeps of the client from now on.
        reason: Why it failed, as in `Failure.reason`.
        error: What it raised, pickled; None where it cannot be.
    """

    answer: bytes | None = None
    kept: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    error: bytes | None = None


def serve(connection: Connection, crew: bytes) -> None:
    """Answer jobs until the other end of the pipe is closed.

    Args:
        connection: Where jobs come from.
        crew: A pickled `Crew`.
    """
    # Ctrl-C reaches every process of a terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            member = _Member(pickle.loads(crew))  # noqa: S301  # from the process that started this one
        except Exception as error:  # whatever unpickling raises is told
            connection.send(f"{type(error).__name__}: {error}")
            return
        connection.send(READY)
        while True:
            # As bytes: what a pipe pickles shares the memory of tensors, which takes a file descriptor for each.
            job = pickle.loads(connection.recv_bytes())  # noqa: S301  # from the process that started this one
            connection.send_bytes(pickle.dumps(member.outcome(job)))


class _Member:
    """The client of a process."""

    def __init__(self, crew: Crew) -> None:
        torch.set_num_threads(crew.threads)
        self._schema = Schema.of(crew.network)
        self._datasets = crew.datasets
        self._client = Client(
            crew.network,
            crew.training,
            loss_fn=crew.objective,
            collate_fn=crew.collate,
            strategy=crew.strategy,
            models=crew.models,
        )

    def outcome(self, job: Job) -> Outcome:
        try:
            if job.base is not None:
                _, self._client.received = decode_broadcast(job.base, self._schema)
            self._client.states[job.client] = dict(job.kept)
            answer = self._client.answer(job.message, self._datasets[job.client], client=job.client)
        except Exception as error:  # whatever a client's data and code raise ends its part alone
            failure = Failure.of(error, round_index=0, client=job.client)
            return Outcome(reason=failure.reason, error=_pickled(error))
        return Outcome(answer=answer, kept=self._client.states.pop(job.client))


def _pickled(error: Exception) -> bytes | None:
    """An exception as bytes that can be read back: not every class of them can."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # noqa: S301  # made in the line above
    except Exception:  # whatever pickling raises
        return None
    return data
