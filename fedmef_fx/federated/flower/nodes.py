"""Which node of a grid is which client: nodes are asked for their number, and again when others come."""

import time
from typing import Any, Final

from flwr.app import Message

from fedmef_fx.errors import RoundError
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
    """

    def __init__(self, grid: Any, *, clients: int) -> None:
        self.clients = clients
        self.samples: dict[int, int] = {}
        self.grid = grid
        self._node: dict[int, int] = {}
        self._asked: set[int] = set()
        self._online: set[int] = set()

    def wait(self, *, timeout_s: float | None) -> None:
        """Wait until every client has a node.

        Raises:
            RoundError: Not in time.
        """
        start = time.perf_counter()
        while True:
            self._look()
            missing = [client for client in range(self.clients) if client not in self._node]
            if not missing:
                return
            if timeout_s is not None and time.perf_counter() - start >= timeout_s:
                raise RoundError(
                    f"flower.serve: got nodes of {len(self._node)} clients in {timeout_s:g} s; expected "
                    f"{self.clients}: none says that it is client {', '.join(map(str, missing[:10]))}. Start a "
                    "SuperNode for each, with --node-config 'partition-id=0' and so on"
                )
            time.sleep(_PAUSE_S)

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
                self._asked.discard(node)  # asked again later
                continue
            if self.samples.setdefault(client, samples) == samples:
                self._node.setdefault(client, node)
