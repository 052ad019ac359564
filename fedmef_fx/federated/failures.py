"""What went wrong with a client in a round: why, in a few words that name no path."""

import re
from typing import Final, Literal, NamedTuple, Self, get_args

from fedmef_fx.errors import CheckpointError, DataError, DivergedError, WireError

__all__ = ["Cause", "Failure", "redacted"]

Cause = Literal["raised", "garbage", "late", "diverged", "unreadable", "died"]
"""The client's code raised an error; its answer was refused; it came too late; its loss was no longer finite; its data
could not be read; its process or its node is gone."""

_LONGEST: Final = 300
# A slash or drive that starts a path: in `dense/fc.weight` and `a / b` none does.
_QUOTED: Final = re.compile(r"(['\"])[^'\"]*[/\\\\][^'\"]*\1")
_PATH: Final = re.compile(r"(?:file://|~|\b[A-Za-z]:)?(?<![\w./\\-])(?:[A-Za-z]:)?[/\\][^\s'\"<>|:,;()]+|\\\\[^\s'\"]+")


class Failure(NamedTuple):
    """Why a client was left out of a round.

    Attributes:
        round_index: The round.
        client: The client.
        reason: Its `cause`, a colon, and a short text without paths.
    """

    round_index: int
    client: int
    reason: str

    @property
    def cause(self) -> str:
        """One of `Cause`."""
        return self.reason.partition(":")[0]

    @property
    def text(self) -> str:
        """What happened, in a few words."""
        return self.reason.partition(": ")[2]

    @classmethod
    def of(cls, error: Exception, *, round_index: int, client: int) -> Self:
        """The failure that an exception stands for."""
        text = str(error).removeprefix(f"client {client}, round {round_index}: ")
        if isinstance(error, WireError | DivergedError):  # what stands in quotes there are names of tensors
            return cls(round_index, client, f"{_cause(error)}: {redacted(text)}")
        kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
        return cls(round_index, client, f"{_cause(error)}: {redacted(_QUOTED.sub('<path>', kind + text))}")

    @classmethod
    def from_json(cls, entry: object) -> Self:
        """Read what JSON made of a failure.

        Raises:
            CheckpointError: It is none.
        """
        match entry:
            case [int(round_index), int(client), str(reason)] if reason.partition(":")[0] in get_args(Cause):
                return cls(round_index, client, reason)
        raise CheckpointError(f"failure: got {entry!r:.80}; expected a round, a client and a reason")


def _cause(error: Exception) -> Cause:
    if isinstance(error, WireError):
        return "garbage"
    if isinstance(error, DivergedError):
        return "diverged"
    return "unreadable" if isinstance(error, DataError) else "raised"


def redacted(text: str) -> str:
    """The first line of a text, cut short, and without paths of the machine it was made on."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = _PATH.sub("<path>", line)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
