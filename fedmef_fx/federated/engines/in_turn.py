"""Clients of this process, one after the other."""

import time
from collections.abc import Sequence
from typing import Any

from fedmef_fx.federated.client import Client
from fedmef_fx.federated.engines.peers import Reply, late_after

__all__ = ["InTurn"]


class InTurn:
    """One `Client` that serves all clients in turn.

    What a broadcast leaves out has not changed since a version that its receiver has, so what was received last, by any
    client, fills it in.

    Args:
        client: It.
        datasets: The data of all clients.
    """

    capacity = 1

    def __init__(self, client: Client, datasets: Sequence[Any]) -> None:
        self._client = client
        self._datasets = datasets
        self._waiting: tuple[int, bytes] | None = None

    def send(self, client: int, message: bytes) -> None:
        """As `Peers.send`."""
        self._waiting = (client, message)

    def receive(self, *, timeout_s: float | None) -> Reply:
        """As `Peers.receive`; a client that hangs is not interrupted, it is late once it has answered."""
        if self._waiting is None:
            raise RuntimeError("InTurn.receive: nothing was sent")
        (client, message), self._waiting = self._waiting, None
        start = time.perf_counter()
        try:
            answer = self._client.answer(message, self._datasets[client], client=client)
        except Exception as error:  # whatever a client's data and code raise ends its part alone
            return Reply(client=client, seconds=time.perf_counter() - start, error=error)
        seconds = time.perf_counter() - start
        if timeout_s is not None and seconds > timeout_s:
            return Reply(client=client, seconds=seconds, answer=answer, reason=late_after(seconds, timeout_s))
        return Reply(client=client, seconds=seconds, answer=answer)
