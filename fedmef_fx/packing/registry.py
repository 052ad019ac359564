"""Which packed buffers are alive: what a meter has to know, because autograd's own hooks cannot see them.

A buffer that a custom autograd function keeps on its context is invisible to
`torch.autograd.graph.saved_tensors_hooks`. So its maker announces it here. Only weak references to storages
are kept: an entry goes when its memory goes.

Kernels announce their temporaries too: what numpy allocates while a kernel runs is invisible to everything that
watches torch. Only listeners (`listening`) hear of them.
"""

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

__all__ = [
    "BufferKind",
    "HeldBuffer",
    "Listener",
    "announce",
    "announce_temporary",
    "held_buffers",
    "listening",
    "next_serial",
]

BufferKind = Literal["packed values", "bitmap", "8-bit"]
"""What a buffer holds; codes of fewer than 8 bits count as packed values, and window offsets
of a max pooling as bitmaps, which tell positions, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeldBuffer:
    """A live buffer.

    Attributes:
        kind: What it holds.
        serial: Grows with every announcement, so that a meter can tell what came after its start.
        storage: The memory; refers weakly.
    """

    kind: BufferKind
    serial: int
    storage: "weakref.ref[torch.UntypedStorage]"


class Listener(Protocol):
    """Hears what is announced, while it is announced."""

    def hear_buffer(self, buffer: Tensor) -> None:
        """A packed buffer was made."""

    def hear_temporary(self, nbytes: int) -> None:
        """A kernel that is about to return has, at its worst moment, allocated so many bytes outside of torch."""


# Process-wide like the allocator it mirrors; it holds nothing alive and is keyed by storage.
_held: Final[dict[int, HeldBuffer]] = {}
_serials: Final = itertools.count()
_listeners: Final[list[Listener]] = []


def announce(buffer: Tensor, kind: BufferKind) -> None:
    """Register the storage of a buffer until it is freed; what is compiled has none."""
    if torch.compiler.is_dynamo_compiling():
        return
    storage = buffer.untyped_storage()
    key = storage._cdata  # the address of the C++ object, which is unique while it lives
    _held[key] = HeldBuffer(kind, next(_serials), weakref.ref(storage, lambda _: _held.pop(key, None)))
    for listener in _listeners:
        listener.hear_buffer(buffer)


def announce_temporary(nbytes: int) -> None:
    """Tell of memory that a kernel had in use outside of torch, on top of its arguments and results."""
    for listener in _listeners:
        listener.hear_temporary(nbytes)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener hear every announcement made inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def next_serial() -> int:
    """A serial number above all given so far."""
    return next(_serials)


def held_buffers() -> dict[int, HeldBuffer]:
    """The live buffers by storage key."""
    return _held.copy()
