"""`Peers`: the clients of a run, as a server sees them: messages go out, replies come back in any order."""

import dataclasses
import signal
from typing import Protocol

__all__ = ["Peers", "Reply", "how_it_ended", "late_after"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reply:
    """What came back of one message: an answer, or why there is no usable one.

    Attributes:
        client: Whom the message went to.
        seconds: How long it took.
        answer: The bytes that the client sent.
        reason: Why the client is left out, as in `Failure.reason`.
        error: What the client's data or code raised.
    """

    client: int
    seconds: float
    answer: bytes | None = None
    reason: str | None = None
    error: Exception | None = None


class Peers(Protocol):
    """Clients that can be asked."""

    @property
    def capacity(self) -> int:
        """How many messages may be under way at once, >= 1."""

    def send(self, client: int, message: bytes) -> None:
        """Send a client a broadcast; nothing else may be under way to it."""

    def receive(self, *, timeout_s: float | None) -> Reply:
        """Wait for the next reply; something has to be under way.

        Args:
            timeout_s: After how many seconds a client is late; None for never.
        """


def late_after(seconds: float, timeout_s: float) -> str:
    """The reason of a client that took too long."""
    return f"late: took {seconds:.1f} s; expected at most {timeout_s:g} s"


def how_it_ended(exit_code: int | None) -> str:
    """The reason of a client whose process is gone."""
    if exit_code is not None and exit_code < 0:
        try:
            return f"died: its process was ended by {signal.Signals(-exit_code).name}"
        except ValueError:  # a signal without a name
            pass
    return f"died: its process ended with exit code {exit_code}"
