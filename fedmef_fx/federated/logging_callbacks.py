"""Callbacks that write every round where it can be looked at while a run goes on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated.callbacks import Callback
from fedmef_fx.federated.history_texts import line_of
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.files.atomic import check_target, replacing

__all__ = ["JsonLines", "TensorBoard"]

_SCALARS: Final = (
    "train_loss",
    "test_loss",
    "test_accuracy",
    "density",
    "bytes_down",
    "bytes_up",
    "peak_saved_bytes",
    "seconds",
)


class JsonLines(Callback):
    """Writes each round as a line of JSON, which `History.load` reads.

    A run that goes on from a checkpoint writes the lines of its earlier rounds again, so that none is there twice.

    Args:
        path: The file; a run that starts over replaces it.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = check_target(path, error=CheckpointError)

    def on_resume(self, rounds: Sequence[RoundRecord], server: Server) -> bool:
        """See `Callback.on_resume`."""
        with replacing(self._path, error=CheckpointError) as temporary:
            temporary.write_text("".join(map(line_of, rounds)), encoding="utf-8")
        return False

    def __call__(self, record: RoundRecord, server: Server) -> bool:
        """See `Callback`."""
        try:
            with self._path.open("w" if record.round_index == 0 else "a", encoding="utf-8") as file:
                file.write(line_of(record))
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot be written: {error}; expected a writable file") from error
        return False


class TensorBoard(Callback):
    """Writes each round's numbers as scalars for TensorBoard.

    Args:
        directory: Where TensorBoard looks for runs.
        clients: Whether each client's numbers are written, too.

    Raises:
        ConfigError: tensorboard is not installed.

    Example:
        >>> run(net, clients, rounds=20, on_round=TensorBoard("runs/first"))  # doctest: +SKIP
    """

    def __init__(self, directory: str | Path, *, clients: bool = False) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise ConfigError(
                "TensorBoard: tensorboard is not installed; pip install fedmef-fx[tensorboard]"
            ) from error
        self._make: Any = SummaryWriter
        self._directory, self._clients = str(directory), clients

    def on_resume(self, rounds: Sequence[RoundRecord], server: Server) -> bool:
        """See `Callback.on_resume`; scalars of later rounds, of a run that was killed, are hidden."""
        with self._make(self._directory, purge_step=len(rounds)):
            return False

    def __call__(self, record: RoundRecord, server: Server) -> bool:
        """See `Callback`."""
        numbers = {name: getattr(record, name) for name in _SCALARS} | {
            f"metrics/{name}": value for name, value in record.metrics.items()
        }
        if self._clients:
            for client, own in record.by_client.items():
                numbers |= {f"client {client}/{name}": value for name, value in own.items()}
        with self._make(self._directory) as writer:
            for name, value in numbers.items():
                if value is not None and math.isfinite(value):
                    writer.add_scalar(name, value, record.round_index)
        return False
