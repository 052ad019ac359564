"""The nodes of a Flower grid as the clients of a run."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from flwr.app import Message

from fedmef_fx.errors import MissingStateError, WireError
from fedmef_fx.federated.engines.peers import Reply, late_after
from fedmef_fx.federated.failures import redacted
from fedmef_fx.federated.flower.nodes import Nodes
from fedmef_fx.federated.flower.parcels import TRAIN, fields_of, packed, payload_of

__all__ = ["GridPeers"]

_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
# How often it is looked whether nodes are still there; Flower itself notices after its heartbeats, half a minute or so.
_LOOK_S: Final = 5.0


class GridPeers:
    """Clients on the nodes of a grid; all of a round are asked at once.

    Args:
        nodes: Which node of a grid is which client.
        about: Run and round of the messages, which nodes want to know before they read them.
    """

    def __init__(self, nodes: Nodes, about: Callable[[], tuple[str, int]]) -> None:
        self._grid, self._nodes, self._about = nodes.grid, nodes, about
        self._waiting: dict[str, tuple[int, int, float]] = {}  # message -> client, node, when it was sent
        self._done: deque[Reply] = deque()
        self._looked = time.perf_counter()

    @property
    def capacity(self) -> int:
        """All of them."""
        return max(1, self._nodes.clients)

    def send(self, client: int, message: bytes) -> None:
        """As `Peers.send`."""
        node = self._nodes.of(client)
        if node is None:
            told = "; ".join(filter(None, ["died: no node of this client is connected", self._nodes.complaints()]))
            self._done.append(Reply(client=client, seconds=0.0, reason=told))
            return
        run, round_index = self._about()
        content = packed(message, run=run, round=round_index)
        parcel = Message(content, node, TRAIN, group_id=str(round_index))
        identity = next(iter(self._grid.push_messages([parcel])), None)
        if not identity:
            self._done.append(Reply(client=client, seconds=0.0, reason="died: its node took no message"))
            return
        self._waiting[identity] = (client, node, time.perf_counter())

    def receive(self, *, timeout_s: float | None) -> Reply:
        """As `Peers.receive`; a late client is not waited for any more, its node goes on."""
        pause = _PAUSE_S
        while not self._done:
            self._take(self._grid.pull_messages(list(self._waiting)))
            self._leave(timeout_s)
            if not self._done:
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE_S, 1.2 * pause)
        return self._done.popleft()

    def _take(self, parcels: Iterable[Any]) -> None:
        """Take replies; which message one belongs to, Flower says, even where the reply is its own error."""
        for parcel in parcels:
            client, _, sent = self._waiting.pop(parcel.metadata.reply_to_message_id, (None, None, 0.0))
            if client is not None:
                self._done.append(_reply(parcel, client, time.perf_counter() - sent))

    def _leave(self, timeout_s: float | None) -> None:
        """Give up on clients that are late, and on those whose node is gone."""
        now = time.perf_counter()
        online = None
        if now - self._looked >= _LOOK_S:
            online, self._looked = set(self._grid.get_node_ids()), now
        for identity, (client, node, sent) in list(self._waiting.items()):
            if timeout_s is not None and now - sent >= timeout_s:
                reason = late_after(now - sent, timeout_s)
            elif online is not None and node not in online:
                reason = "died: its node is gone"
            else:
                continue
            del self._waiting[identity]
            self._done.append(Reply(client=client, seconds=now - sent, reason=reason))


def _reply(parcel: Any, client: int, seconds: float) -> Reply:
    """What a node's reply says."""
    if parcel.has_error():
        # Flower's own words carry tracebacks with paths.
        return Reply(client=client, seconds=seconds, reason=f"died: Flower error {int(parcel.error.code)}")
    fields = fields_of(parcel.content)
    if fields.get("wants") == "complete":
        error = MissingStateError(f"client {client} asks for a complete broadcast")
        return Reply(client=client, seconds=seconds, error=error)
    if "reason" in fields:
        return Reply(client=client, seconds=seconds, reason=_known(str(fields["reason"])))
    try:
        return Reply(client=client, seconds=seconds, answer=payload_of(parcel.content))
    except WireError as error:
        return Reply(client=client, seconds=seconds, error=error)


def _known(reason: str) -> str:
    """A node's reason, with a cause that there is: a node may say anything."""
    cause, _, text = redacted(reason).partition(": ")
    return f"{cause}: {text}" if cause in _CAUSES else f"raised: {redacted(reason)}"


_CAUSES: Final = ("raised", "diverged", "unreadable", "garbage")
