"""The command line as it was called, for what pages say about themselves; imported without torch."""

import shlex
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

__all__ = ["command_line", "remember"]

_LINE: Final[ContextVar[str | None]] = ContextVar("command line", default=None)


def remember(name: str, arguments: Sequence[str]) -> None:
    """Note the command line.

    Args:
        name: Of the program.
        arguments: What followed it.
    """
    _LINE.set(shlex.join([name, *arguments]))


def command_line() -> str | None:
    """The command line that runs; None outside of one."""
    return _LINE.get()
