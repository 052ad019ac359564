"""The rounds of a run, one after the other, wherever its clients are: see `engines`."""

import dataclasses
import functools
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedmef_fx.federated.asking import Answers, ask
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.callbacks import Callback, OnRound
from fedmef_fx.federated.checkpoint import Checkpoint, round_file_name, save_checkpoint
from fedmef_fx.federated.engines.peers import Peers
from fedmef_fx.federated.history import History
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.one_round import play_round
from fedmef_fx.federated.progress import log_round
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.seeds import derive_seed
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.strategy import Strategy
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["Table", "play"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What is on the server's side of a run.

    Attributes:
        server: It.
        history: What has happened so far; it grows.
        strategy: Who takes part.
        clients: How many clients there are.
        states: What the strategy keeps of each client, where clients run on this machine; it grows.
        sample: Client -> one of its inputs, without the batch dimension; for methods that look at one before the run.
        objective: What is minimised, and measured.
        collate: Makes a batch of items; None for what torch's loaders do.
        test: Test data for the model; None for none.
        client_tests: A test set per client, see `run`.
        directory: Where checkpoints go; None for nowhere.
        keep_rounds: Whether a checkpoint of every round is kept.
        progress: Called with every finished round.
        callbacks: See `run`.
    """

    server: Server
    history: History
    strategy: Strategy
    clients: int
    states: MutableMapping[int, dict[str, Tensor]]
    sample: Callable[[int], Tensor]
    objective: Objective
    collate: Collate | None = None
    test: Any = None
    client_tests: Sequence[Any] | None = None
    directory: Path | None = None
    keep_rounds: bool = False
    progress: Callable[[RoundRecord], None] | None = None
    callbacks: Sequence[OnRound] = ()

    @functools.cached_property
    def is_over(self) -> bool:
        """Whether callbacks end a run that goes on, when they are told of the rounds before."""
        if not self.history.rounds:
            return False
        callbacks = [callback for callback in self.callbacks if isinstance(callback, Callback)]
        ends = [callback.on_resume(tuple(self.history.rounds), self.server) for callback in callbacks]
        return any(ends)

    def checkpoint(self) -> Checkpoint:
        """Where the run stands."""
        return Checkpoint(
            self.server.state,
            self.server.changed,
            self.server.known,
            tuple(self.history.rounds),
            self.history.settings,
            dict(self.server.memory),
            tuple(self.history.failures),
            {client: dict(kept) for client, kept in self.states.items()},
        )

    def save(self) -> None:
        """Write the checkpoint of a finished round."""
        if self.directory is None:
            return
        checkpoint = self.checkpoint()
        save_checkpoint(self.directory, checkpoint)
        if self.keep_rounds:
            save_checkpoint(self.directory, checkpoint, name=round_file_name(len(self.history.rounds)))


def play(table: Table, peers: Peers, *, rounds: int) -> None:
    """Play the rounds of a run that are left.

    Args:
        table: The server's side.
        peers: The clients.
        rounds: How many rounds the run has.

    Raises:
        RoundError: Too few clients gave a usable answer in too many rounds.
    """
    server, history, strategy = table.server, table.history, table.strategy
    opened = _open(table, peers)
    history.failures.extend(opened.failures)
    if table.directory is not None and table.keep_rounds and not history.rounds:
        save_checkpoint(table.directory, table.checkpoint(), name=round_file_name(0))
    short, seed = 0, transformation_of(server.model).config.seed
    for round_index in range(len(history.rounds), rounds):
        chosen = strategy.select(round_index, table.clients, seed=derive_seed(seed, "sample", round_index))
        record, answers = play_round(
            server,
            peers,
            chosen,
            strategy,
            test=table.test,
            client_tests=table.client_tests,
            objective=table.objective,
            collate=table.collate,
        )
        if round_index == 0:
            record = dataclasses.replace(
                record,
                bytes_down=record.bytes_down + opened.bytes_down,
                bytes_up=record.bytes_up + opened.bytes_up,
            )
        history.rounds.append(record)
        history.failures.extend(answers.failures)
        table.save()
        log_round(record, rounds=rounds)
        if table.progress is not None:
            table.progress(record)
        short = 0 if record.clients else short + 1
        if short == strategy.patience or (short and len(history.rounds) == rounds == short):
            raise answers.shortage(round_index, rounds=short, minimum=strategy.minimum) from answers.error
        ends = [callback(record, server) is True for callback in table.callbacks]
        if strategy.after_round(record, server) or any(ends):
            break


def _open(table: Table, peers: Peers) -> Answers:
    """Find the first masks, with a report of every client where the method wants one."""
    server, strategy = table.server, table.strategy
    if not server.is_opening:
        return Answers()
    answers = ask(server, peers, range(table.clients if server.asks_for_opening else 0), strategy)
    if server.asks_for_opening and len(answers.updates) < strategy.minimum:
        raise answers.shortage(0, rounds=1, minimum=strategy.minimum) from answers.error
    server.open(answers.updates, sample=table.sample(next(iter(answers.updates), 0)))
    return answers
