"""What a node keeps between rounds: what `Client.save` writes, of the last two rounds.

Of two, because a server that goes on from a checkpoint may repeat its last round: then what strategies kept has to be
what it was before. Flower's context holds it as long as the node runs; a folder holds it for longer, and for other
Flower runs that go on with the same federation.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated.client import Client
from fedmef_fx.files.atomic import replacing, usable_folder

__all__ = ["ContextStore", "FolderStore", "NodeState", "Store"]

_ARRAYS: Final = "fedmef.state"
_RUN: Final = "fedmef.run"
_ROUNDS: Final = 2


class Store(Protocol):
    """Where states lie: round -> bytes."""

    def read(self, run: str) -> Mapping[int, bytes]:
        """What is kept of a run."""

    def write(self, run: str, rounds: Mapping[int, bytes]) -> None:
        """Keep this and nothing else."""


class NodeState:
    """The state of a client.

    Args:
        store: Where it lies.
        client: Whose it is.
        run: The federation's run.
        round_index: The round that is answered.
    """

    def __init__(self, store: Store, client: Client, *, run: str, round_index: int) -> None:
        self._store, self._client, self._run, self._round_index = store, client, run, round_index
        kept = {index: data for index, data in store.read(run).items() if index < round_index}
        self._earlier = dict(sorted(kept.items())[1 - _ROUNDS :])
        for data in list(self._earlier.values())[-1:]:
            try:
                client.restore(data)
            except CheckpointError:  # damaged, or of another model: the server sends everything again
                self._earlier = {}

    def keep(self) -> None:
        """Keep what the client has after the round."""
        self._store.write(self._run, {**self._earlier, self._round_index: self._client.kept()})


class ContextStore:
    """A store in Flower's context."""

    def __init__(self, context: Any) -> None:
        self._records = context.state

    def read(self, run: str) -> Mapping[int, bytes]:
        """As `Store.read`."""
        about, arrays = self._records.config_records.get(_RUN), self._records.array_records.get(_ARRAYS)
        if about is None or arrays is None or about["run"] != run:
            return {}
        return {int(name): array.numpy().tobytes() for name, array in arrays.items()}

    def write(self, run: str, rounds: Mapping[int, bytes]) -> None:
        """As `Store.write`."""
        self._records[_ARRAYS] = ArrayRecord(
            {str(index): Array(np.frombuffer(data, dtype=np.uint8)) for index, data in rounds.items()}
        )
        self._records[_RUN] = ConfigRecord({"run": run})


class FolderStore:
    """A store in a folder, one file per round.

    Args:
        folder: Made if it is missing.
        client: The client's number.
    """

    def __init__(self, folder: Path, client: int) -> None:
        self._folder, self._client = folder, client
        usable_folder(folder, error=ConfigError)

    def _prefix(self, run: str) -> str:
        return f"client-{self._client}-{hashlib.sha256(run.encode()).hexdigest()[:16]}-"

    def read(self, run: str) -> Mapping[int, bytes]:
        """As `Store.read`."""
        prefix = self._prefix(run)
        found = sorted(self._folder.glob(f"{prefix}*.safetensors"))
        return {int(path.stem.removeprefix(prefix)): path.read_bytes() for path in found}

    def write(self, run: str, rounds: Mapping[int, bytes]) -> None:
        """As `Store.write`; files of other runs stay."""
        prefix = self._prefix(run)
        wanted = {self._folder / f"{prefix}{index:05d}.safetensors": data for index, data in rounds.items()}
        for path, data in wanted.items():
            with replacing(path, error=CheckpointError) as temporary:
                temporary.write_bytes(data)
        for path in set(self._folder.glob(f"{prefix}*.safetensors")) - wanted.keys():
            path.unlink()
