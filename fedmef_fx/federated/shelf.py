"""Where a server puts updates until the round ends: in memory as long as they are few, else in a temporary file.

The file has no name, so nothing of it is left, however the process ends. It lies where Python puts temporary files
(`TMPDIR`).
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedmef_fx.federated.lazy_tensors import LazyGradients, LazyTensor, LazyTensors
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.state import TensorSpec
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["Shelf"]

_FIELDS = ("values", "dense", "votes", "scores", "masks", "extras")


class Shelf:
    """Holds the updates of one round.

    Args:
        memory: How many bytes of them stay in memory, >= 0.
    """

    def __init__(self, memory: int) -> None:
        self._left = memory
        self._file: _Storage | None = None
        self._end = 0

    def put(self, update: Update, *, known: Mapping[str, Tensor]) -> Update:
        """Keep an update.

        Args:
            update: The update.
            known: Dense tensors that are in memory anyway.

        Returns:
            The same update; its tensors may be read from the file when they are asked for.
        """
        own = {id(tensor) for tensor in known.values()}
        tensors = [t for field in _FIELDS for t in getattr(update, field).values() if id(t) not in own]
        tensors += [part for gradient in update.gradients.values() for part in (gradient.positions, gradient.values)]
        size = sum(tensor.nbytes for tensor in tensors)
        if size <= self._left:
            self._left -= size
            return update
        stored: dict[str, Any] = {field: self._stored(getattr(update, field), own) for field in _FIELDS}
        return dataclasses.replace(update, **stored, gradients=self._stored_gradients(update.gradients))

    def _stored(self, tensors: Mapping[str, Tensor], own: set[int]) -> Mapping[str, Tensor]:
        if not tensors:
            return tensors
        kept = {name: tensor for name, tensor in tensors.items() if id(tensor) in own}
        places = {name: self._write(tensor) for name, tensor in tensors.items() if name not in kept}
        return _Stored(self._opened(), places, kept, tuple(tensors))

    def _stored_gradients(self, gradients: Mapping[str, SparseGradient]) -> Mapping[str, SparseGradient]:
        places = {
            name: (self._write(gradient.positions), self._write(gradient.values), gradient.numel)
            for name, gradient in gradients.items()
        }
        return _StoredGradients(self._opened(), places) if places else gradients

    def _write(self, tensor: Tensor) -> "_Place":
        place = _Place(TensorSpec.of(tensor), self._end)
        flat = tensor.contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
        file = self._opened()
        while data:
            written = file.write(data, self._end)
            data, self._end = data[written:], self._end + written
        return place

    def _opened(self) -> "_Storage":
        if self._file is None:
            self._file = _Storage()
        return self._file


class _Storage:
    """A file without a name, which is closed when nobody holds it any more."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        os.close(self._descriptor)

    def write(self, data: memoryview, at: int) -> int:
        """Write as much as goes; how much it was."""
        return os.pwrite(self._descriptor, data, at)

    def read_into(self, data: memoryview, at: int) -> int:
        """Read as much as comes; how much it was."""
        return os.preadv(self._descriptor, [data], at)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor stands in the file."""

    spec: TensorSpec
    start: int

    def read(self, file: _Storage, start: int, stop: int) -> Tensor:
        """Elements from `start` to `stop`."""
        size = self.spec.dtype.itemsize
        data = bytearray((stop - start) * size)
        view, at = memoryview(data), self.start + start * size
        while view:
            count = file.read_into(view, at)
            if not count:
                raise EOFError("a temporary file of updates was cut short")
            view, at = view[count:], at + count
        return torch.frombuffer(data, dtype=self.spec.dtype) if data else torch.empty(0, dtype=self.spec.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored(LazyTensors):
    file: _Storage
    places: Mapping[str, _Place]
    kept: Mapping[str, Tensor]
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec.of(self.kept[name]) if name in self.kept else self.places[name].spec

    def part(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.kept:
            return self.kept[name].reshape(-1)[start:stop]
        return self.places[name].read(self.file, start, stop)


@dataclasses.dataclass(frozen=True, eq=False)
class _StoredGradients(LazyGradients):
    file: _Storage
    places: Mapping[str, tuple[_Place, _Place, int]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def parts(self, name: str) -> tuple[LazyTensor, LazyTensor, int]:
        positions, values, numel = self.places[name]
        return self._lazy(positions), self._lazy(values), numel

    def _lazy(self, place: _Place) -> LazyTensor:
        return LazyTensor(place.spec, functools.partial(place.read, self.file))
