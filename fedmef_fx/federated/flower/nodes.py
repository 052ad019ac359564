"""Which node of a grid is which client: nodes are asked for their number, and again when others come."""

import time
from typing import Any, Final

from flwr.app import Message

from fedmef_fx.errors import RoundError
from fedmef_fx.federated.failures import redacted
from fedmef_fx.federated.flower.parcels import QUERY, fields_of, packed

__all__ = ["Nodes"]

_PAUSE_S: Final = 0.5
_ANSWER_S: Final = 60.0


class Nodes:
    """The nodes of a grid, by the number of their client.

    Of two nodes that claim a number, the one that had it first keeps it, as long as it is connected.

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
        self._node: dict[int, int] = {}
        self._asked: set[int] = set()
        self._online: set[int] = set()

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
            missing = [client for client in range(self.clients) if client not in self._node]
            if not missing:
                return
            is_late = timeout_s is not None and time.perf_counter() - start >= timeout_s
            if is_late or (are_own and self.refused):
                seconds, names = time.perf_counter() - start, ", ".join(map(str, missing[:10]))
                raise RoundError(
                    f"flower.serve: got nodes of {len(self._node)} clients in {seconds:.1f} s; expected "
                    f"{self.clients}: none says that it is client {names}. Start a SuperNode for each, with "
                    f"--node-config 'partition-id=0' and so on. {self.complaints()}"
                )
            time.sleep(_PAUSE_S)

    def complaints(self) -> str:
        """What the nodes said that are nobody's."""
        return "; ".join(f"a node said: {text}" for text in list(self.refused.values())[:3])

    def of(self, client: int) -> int | None:
        """The node of a client; None where none is connected."""
        node = self._node.get(client)
        if node is None or node not in set(self.grid.get_node_ids()):
            self._look()
            node = self._node.get(client)
        return node

    def _look(self) -> None:
        """Forget nodes that are gone, and ask those that came for their number."""
        online = set(self.grid.get_node_ids())
        self._node = {client: node for client, node in self._node.items() if node in online}
        self._asked &= online
        new = sorted(online - self._asked)
        if not new:
            return
        self._asked |= set(new)
        messages = [Message(packed(), node, QUERY, group_id="query") for node in new]
        for reply in self.grid.send_and_receive(messages, timeout=_ANSWER_S):
            node = reply.metadata.src_node_id
            fields = {} if reply.has_error() else fields_of(reply.content)
            client, samples = fields.get("client"), fields.get("samples")
            if type(client) is not int or type(samples) is not int or not 0 <= client < self.clients or samples < 1:
                said = reply.error.reason if reply.has_error() else fields.get("reason", f"client {client!r:.20}")
                self.refused[node] = redacted((str(said).strip().splitlines() or [""])[-1])
                self._asked.discard(node)  # asked again later
                continue
            self.refused.pop(node, None)
            if self.samples.setdefault(client, samples) == samples:
                self._node.setdefault(client, node)
