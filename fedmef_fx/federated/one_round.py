"""A round: ask clients, average what they answer, evaluate the new model."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.asking import Answers, ask
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.engines.peers import Peers
from fedmef_fx.federated.evaluation import evaluation_of
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.strategy import Strategy
from fedmef_fx.sparse_model.masks import density

__all__ = ["play_round"]


def play_round(  # what a round is made of
    server: Server,
    peers: Peers,
    chosen: Sequence[int],
    strategy: Strategy,
    *,
    test: Any,
    client_tests: Sequence[Any] | None = None,
    objective: Objective,
    collate: Collate | None = None,
) -> tuple[RoundRecord, Answers]:
    """Play one round, and evaluate the new model.

    Without enough answers the model stays as it was, and the record names no clients.
    """
    start = time.perf_counter()
    task = server.task()
    answers = ask(server, peers, chosen, strategy)
    has_quorum = len(answers.updates) >= strategy.minimum
    if has_quorum:
        churn = server.finish_round(answers.updates)
    else:
        churn = {}
        server.skip_round()
    updates = list(answers.updates.values()) if has_quorum else []
    is_last = task.round_index + 1 == task.rounds
    is_evaluated = is_last or (task.round_index + 1) % strategy.evaluate_every == 0
    found = None
    if is_evaluated and test is not None:
        found = evaluation_of(server.model, test, loss_fn=objective, collate=collate)
    by_client = dict(answers.by_client) if has_quorum else {}
    for index, own in enumerate(client_tests or ()) if is_evaluated else ():
        if own is not None:
            by_client[index] = by_client.get(index, {}) | _tested(server, own, objective, collate)
    samples = sum(update.samples for update in updates)
    record = RoundRecord(
        round_index=task.round_index,
        adjusted=task.counts is not None and has_quorum,
        clients=tuple(sorted(answers.updates)) if has_quorum else (),
        train_loss=sum(u.loss * u.samples for u in updates) / samples if updates else math.nan,
        test_loss=None if found is None else found.loss,
        test_accuracy=None if found is None else found.accuracy,
        density=density(server.model),
        bytes_down=answers.bytes_down,
        bytes_up=answers.bytes_up,
        seconds=time.perf_counter() - start,
        peak_saved_bytes=max((update.peak_saved_bytes for update in updates), default=0),
        churn=churn,
        metrics=_means(updates) | ({} if found is None else dict(found.metrics)),
        by_client=dict(sorted(by_client.items())),
    )
    return dataclasses.replace(record, metrics=record.metrics | _own_metrics(strategy, server)), answers


def _tested(server: Server, own: Any, objective: Objective, collate: Collate | None) -> dict[str, float]:
    """The new model on one client's test set."""
    found = evaluation_of(server.model, own, loss_fn=objective, collate=collate)
    accuracy = {} if found.accuracy is None else {"test_accuracy": found.accuracy}
    return {"test_loss": found.loss, **accuracy, **found.metrics}


def _means(updates: Sequence[Update]) -> dict[str, float]:
    """Each number that clients sent of their own, over those that sent it, weighted by samples."""
    names = dict.fromkeys(name for update in updates for name in update.metrics)
    result = {}
    for name in sorted(names):
        found = [(update.metrics[name], update.samples) for update in updates if name in update.metrics]
        # Sorted, so that the order of clients does not matter.
        total = sum(sorted(value * samples for value, samples in found))
        result[name] = total / sum(samples for _, samples in found)
    return result


def _own_metrics(strategy: Strategy, server: Server) -> dict[str, float]:
    """The strategy's numbers about a round.

    Raises:
        ConfigError: Something else than numbers by name.
    """
    found = strategy.metrics(server)
    for name, value in found.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"{type(strategy).__name__}.metrics: got {name!r:.80}: {value!r:.80}; expected a number by name, e.g. "
                "float(tensor)"
            )
    return {name: float(value) for name, value in found.items()}
