"""What `run(progress=...)` does with each finished round: a line on stderr, a function's call, or nothing."""

import logging
import sys
from collections.abc import Callable
from typing import Final

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.rounds import RoundRecord

__all__ = ["log_round", "progress_of"]

_LOGGER: Final = logging.getLogger(__name__)


def progress_of(
    progress: bool | Callable[[RoundRecord], None] | None, *, rounds: int
) -> Callable[[RoundRecord], None] | None:
    """What is called with every finished round.

    Args:
        progress: True for a line on stderr, a function, or nothing.
        rounds: Number of rounds.

    Raises:
        ConfigError: Something else.
    """
    if progress is None or progress is False:
        return None
    if progress is True:
        return lambda record: print(_line(record, rounds), file=sys.stderr, flush=True)
    if callable(progress):
        return progress
    raise ConfigError(
        f"federated.run: progress: got {type(progress).__name__}; expected True, or a function of a RoundRecord"
    )


def log_round(record: RoundRecord, *, rounds: int) -> None:
    """Tell the logger of a finished round."""
    _LOGGER.info("%s", _line(record, rounds))


def _line(record: RoundRecord, rounds: int) -> str:
    parts = [f"round {record.round_index + 1} of {rounds}: loss {record.train_loss:.4f}"]
    if record.test_accuracy is not None:
        parts.append(f"test accuracy {record.test_accuracy:.4f}")
    parts += [f"density {record.density:.3f}", f"{record.seconds:.1f} s"]
    return ", ".join(parts)
