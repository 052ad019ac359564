"""Which node of a grid is which client: nodes are asked for their number, and again when others come."""

import time
from typing import Any, Final

from flwr.app import Message

from fedmef_fx.errors import RoundError
from fedmef_fx.federated.failures import redacted
from fedmef_fx.federated.flower.parcels import QUERY, fields_of, packed

__all__ = ["Nodes"]

_PAUSE_S: Final = 0.5
# In a round: a node that came back and needs longer to say who it is takes part in a later one.
_ANSWER_S: Final = 5.0


class Nodes:
    """The nodes of a grid, by the number of their client.

    A node may take its time to answer: where it runs, processes start and data is counted. Of two nodes that claim a
    number, the one that had it first keeps it, as long as it is connected.

    Args:
        grid: Flower's.
        clients: How many clients there are.

    Attributes:
        samples: Client -> how many samples it declared.
        refused: Node -> why it is nobody's, as far as it said so.
    """

    def __init__(self, grid: Any, *, clients: int) -> None:
        self.clients = clients
        self.samples: dict[int, int] = {}
        self.refused: dict[int, str] = {}
        self.grid = grid
        self._client: dict[int, int] = {}  # node -> client, in the order in which they claimed them
        self._asked: dict[str, int] = {}  # message without a reply yet -> node

    def wait(self, *, timeout_s: float | None, are_own: bool = False) -> None:
        """Wait until every client has a node.

        Args:
            timeout_s: How long; None for ever.
            are_own: Whether a node that refuses is reason enough to give up.

        Raises:
            RoundError: Not in time.
        """
        start = time.perf_counter()
        while True:
            self._look()
            missing = sorted(set(range(self.clients)) - set(self._client.values()))
            if not missing:
                return
            is_late = timeout_s is not None and time.perf_counter() - start >= timeout_s
            if is_late or (are_own and self.refused):
                seconds, names = time.perf_counter() - start, ", ".join(map(str, missing[:10]))
                raise RoundError(
                    f"flower.serve: got nodes of {self.clients - len(missing)} clients in {seconds:.1f} s; expected "
                    f"{self.clients}: none says that it is client {names}. Start a SuperNode for each, with "
                    f"--node-config 'partition-id=0' and so on. {self.complaints()}".rstrip()
                )
            time.sleep(_PAUSE_S)

    def complaints(self) -> str:
        """What the nodes said that are nobody's, and how many have not said anything yet."""
        texts = [f"a node said: {text}" for text in list(self.refused.values())[:3]]
        if self._asked:
            texts.append(f"nodes that were asked and have not answered: {len(self._asked)}")
        return "; ".join(texts)

    def of(self, client: int) -> int | None:
        """The node of a client; None where none is connected."""
        node = self._node_of(client, set(self.grid.get_node_ids()))
        end = time.perf_counter() + _ANSWER_S
        while node is None:
            online = self._look()
            node = self._node_of(client, online)
            if node is not None or not self._asked or time.perf_counter() >= end:
                return node
            time.sleep(_PAUSE_S)
        return node

    def _node_of(self, client: int, online: set[int]) -> int | None:
        return next((node for node, number in self._client.items() if number == client and node in online), None)

    def _look(self) -> set[int]:
        """Forget nodes that are gone, ask those that came for their number, take what was answered; who is there."""
        online = set(self.grid.get_node_ids())
        self._client = {node: client for node, client in self._client.items() if node in online}
        self._asked = {message: node for message, node in self._asked.items() if node in online}
        self.refused = {node: text for node, text in self.refused.items() if node in online}
        for node in sorted(online - set(self._client) - set(self._asked.values())):
            message = Message(packed(), node, QUERY, group_id="query")
            for identity in filter(None, self.grid.push_messages([message])):
                self._asked[identity] = node
        if self._asked:
            for reply in self.grid.pull_messages(list(self._asked)):
                self._take(reply)
        return online

    def _take(self, reply: Any) -> None:
        """Take what a node says; one that is nobody's is asked again later."""
        node = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if node is None:
            return
        fields = {} if reply.has_error() else fields_of(reply.content)
        client, samples = fields.get("client"), fields.get("samples")
        if type(client) is not int or type(samples) is not int or not 0 <= client < self.clients or samples < 1:
            said = reply.error.reason if reply.has_error() else fields.get("reason", f"client {client!r:.20}")
            self.refused[node] = redacted((str(said).strip().splitlines() or [""])[-1])
        elif self.samples.setdefault(client, samples) != samples:
            self.refused[node] = f"client {client} has {samples} samples; it had {self.samples[client]} before"
        else:
            self.refused.pop(node, None)
            self._client[node] = client
