"""Ask clients for their updates, and leave out those that fail."""

import dataclasses
from collections import deque
from collections.abc import Sequence

from fedmef_fx.errors import MissingStateError, RoundError, WireError
from fedmef_fx.federated.engines.peers import Peers, Reply
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.strategy import Strategy

__all__ = ["Answers", "ask"]


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


def ask(server: Server, peers: Peers, chosen: Sequence[int], strategy: Strategy) -> Answers:
    """Ask clients for their updates.

    Args:
        server: It says what is asked for.
        peers: The clients.
        chosen: Whom to ask; reserves come last.
        strategy: How many answers are wanted, and when they are late.
    """
    answers, chosen = Answers(), list(dict.fromkeys(chosen))
    wanted = len(chosen) if strategy.clients_per_round is None or server.is_opening else strategy.clients_per_round
    waiting, under_way = deque(chosen), dict[int, int]()  # client -> bytes that it was sent
    while True:
        while waiting and len(under_way) < peers.capacity and len(answers.updates) + len(under_way) < wanted:
            client = waiting.popleft()
            under_way[client] = _send(server, peers, client)
        if not under_way:
            break
        reply = peers.receive(timeout_s=strategy.timeout_s)
        sent = under_way.pop(reply.client)
        if isinstance(reply.error, MissingStateError) and reply.client in server.known:
            server.forget(reply.client)
            under_way[reply.client] = sent + _send(server, peers, reply.client)
            continue
        _take(server, reply, answers, sent=sent)
    # In the order in which they were asked, whoever answered first.
    answers.updates = {client: answers.updates[client] for client in chosen if client in answers.updates}
    answers.failures.sort(key=lambda failure: chosen.index(failure.client))
    return answers


def _send(server: Server, peers: Peers, client: int) -> int:
    message = server.broadcast(client)
    peers.send(client, message)
    return len(message)


def _take(server: Server, reply: Reply, answers: Answers, *, sent: int) -> None:
    """Take an update, or note why there is none."""
    round_index, client, error = server.state.version, reply.client, reply.error
    answers.bytes_down += sent
    answers.bytes_up += len(reply.answer or b"")
    if reply.reason is not None:
        answers.failures.append(Failure(round_index, client, reply.reason))
        return
    if reply.answer is not None:
        try:
            update = server.receive(client, reply.answer)
        except WireError as refused:
            error = refused
        else:
            answers.updates[client] = update
            answers.by_client[client] = {
                "samples": update.samples,
                "loss": update.loss,
                "bytes_down": sent,
                "bytes_up": len(reply.answer),
                "peak_saved_bytes": update.peak_saved_bytes,
                **update.metrics,
            }
    if error is not None:
        answers.failures.append(Failure.of(error, round_index=round_index, client=client))
        answers.error = error
