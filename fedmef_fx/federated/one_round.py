"""A round in one process: ask clients one after the other, leave out those that fail, average the rest."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from fedmef_fx.errors import ConfigError, RoundError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.evaluation import evaluation_of
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.objective import Objective
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.strategy import Strategy
from fedmef_fx.sparse_model.masks import density

__all__ = ["Answers", "ask", "play_round"]


@dataclasses.dataclass(slots=True)
class Answers:
    """What came of asking clients.

    Attributes:
        updates: Client -> its update.
        failures: Those that were left out.
        bytes_down: Bytes that were sent to them.
        bytes_up: Bytes that they sent.
        error: What the last failure raised.
        by_client: Client -> what was counted of it, for those with an update.
    """

    updates: dict[int, Update] = dataclasses.field(default_factory=dict)
    failures: list[Failure] = dataclasses.field(default_factory=list)
    bytes_down: int = 0
    bytes_up: int = 0
    error: Exception | None = None
    by_client: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def shortage(self, round_index: int, *, rounds: int, minimum: int) -> RoundError:
        """The error of a run in which too many clients fail."""
        last = self.failures[-1] if self.failures else None
        why = f"client {last.client}, round {last.round_index}: {last.reason}" if last else "no client failed"
        return RoundError(
            f"federated.run: round {round_index}: got {len(self.updates)} usable answers; expected at least {minimum}; "
            f"too few for {rounds} rounds in a row. {why}. The model is as it was before; History.failures and the "
            "checkpoint list all failures. Mend the cause, e.g. by a smaller LocalTraining.learning_rate, and go on "
            "from checkpoint_dir"
        )


def ask(server: Server, client: Client, datasets: Sequence[Any], chosen: Sequence[int], strategy: Strategy) -> Answers:
    """Ask clients for their updates.

    Args:
        server: It says what is asked for.
        client: Serves all clients in turn.
        datasets: The data of all clients.
        chosen: Whom to ask; reserves come last.
        strategy: How many answers are wanted, and when they are late.
    """
    answers = Answers()
    round_index = server.task().round_index
    wanted = len(chosen) if strategy.clients_per_round is None or server.is_opening else strategy.clients_per_round
    for index in chosen:
        if len(answers.updates) >= wanted:
            break
        message = server.broadcast(index)
        answers.bytes_down += len(message)
        start = time.perf_counter()
        try:
            answer = client.answer(message, datasets[index], client=index)
            seconds = time.perf_counter() - start
            answers.bytes_up += len(answer)
            if strategy.timeout_s is not None and seconds > strategy.timeout_s:
                reason = f"late: took {seconds:.1f} s; expected at most {strategy.timeout_s:g} s"
                answers.failures.append(Failure(round_index, index, reason))
                continue
            update = server.receive(index, answer)
            answers.updates[index] = update
            answers.by_client[index] = {
                "samples": update.samples,
                "loss": update.loss,
                "bytes_down": len(message),
                "bytes_up": len(answer),
                "peak_saved_bytes": update.peak_saved_bytes,
                **update.metrics,
            }
        except Exception as error:  # whatever a client's data and code raise ends its part alone
            answers.failures.append(Failure.of(error, round_index=round_index, client=index))
            answers.error = error
    return answers


def play_round(  # what a round is made of
    server: Server,
    client: Client,
    datasets: Sequence[Any],
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
    answers = ask(server, client, datasets, chosen, strategy)
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
