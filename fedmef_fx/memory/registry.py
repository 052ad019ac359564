"""Which packed buffers are alive: what a meter has to know, because autograd's own hooks cannot see them.

A buffer that a custom autograd function keeps on its context is invisible to
`torch.autograd.graph.saved_tensors_hooks`. So whoever makes one announces it here. Only weak references to storages
are kept: an entry goes when its memory goes.
"""

import dataclasses
import itertools
import weakref
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["BufferKind", "HeldBuffer", "announce", "held_buffers", "next_serial"]

BufferKind = Literal["packed values", "bitmap", "8-bit"]
"""What a buffer holds; window offsets of a max pooling count as bitmaps, which tell positions, too."""


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


# Process-wide like the allocator it mirrors; it holds nothing alive and is keyed by storage.
_held: Final[dict[int, HeldBuffer]] = {}
_serials: Final = itertools.count()


def announce(buffer: Tensor, kind: BufferKind) -> None:
    """Register the storage of a buffer until it is freed."""
    storage = buffer.untyped_storage()
    key = storage._cdata  # the address of the C++ object, which is unique while it lives
    _held[key] = HeldBuffer(kind, next(_serials), weakref.ref(storage, lambda _: _held.pop(key, None)))


def next_serial() -> int:
    """A serial number above all given so far."""
    return next(_serials)


def held_buffers() -> dict[int, HeldBuffer]:
    """The live buffers by storage key."""
    return _held.copy()
