"""The kernels in numpy, block by block so that temporaries stay in the cache and never have the size of the tensor."""

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.packing.bitmap import bitmap_nbytes, check_bitmap, count_bits
from fedmef_fx.packing.registry import announce_temporary
from fedmef_fx.packing.words import Words, floats, magnitude_mask, nearest, round_down, word, words

__all__ = ["NumpyBackend", "block_nbytes", "check_count"]

_LITTLE: Final = "little"
# Elements per block: 128 KiB of float32, so that what a block computes step by step stays in the second-level cache;
# a multiple of 8, so that two blocks never write the same byte of a bitmap.
BLOCK: Final = 32_768


def check_count(bitmap: Tensor, values: Tensor) -> None:
    """Refuse values that do not belong to a bitmap, before a kernel reads beyond them.

    Raises:
        ValueError: As many values as set bits are needed.
    """
    marked = count_bits(bitmap.numpy())
    if values.numel() != marked:
        raise ValueError(f"unpack: got {values.numel()} values; expected one per set bit, that is {marked}")


def _blocks(numel: int) -> Iterator[tuple[int, int]]:
    """The ends `[start, stop)` of every block."""
    return ((start, min(start + BLOCK, numel)) for start in range(0, numel, BLOCK))


def _join(pieces: list[Words], *, of: Tensor) -> Tensor:
    """The pieces of a tensor as one that torch allocated, so that memory trackers see it."""
    values = torch.empty(sum(piece.size for piece in pieces), dtype=of.dtype)
    announce_temporary(values.nbytes + block_nbytes(of))
    if pieces:
        np.concatenate(pieces, out=words(values))
    return values


def block_nbytes(x: Tensor) -> int:
    """Temporaries of one block at most: its words masked and compared, 0/1 bytes, and 8-byte positions."""
    return min(BLOCK, x.numel()) * (x.dtype.itemsize + 2 + np.dtype(np.intp).itemsize)


def _positions(marked: NDArray[Any]) -> NDArray[np.intp]:
    """Where 0/1 bytes or booleans are set; numpy searches booleans three times as fast as integers."""
    return np.flatnonzero(marked.view(np.bool_))


def _take(chunk: Words, marked: NDArray[Any]) -> Words:
    """`chunk[marked]`, by index: twice as fast as a boolean mask in numpy."""
    taken: Words = chunk.take(_positions(marked))
    return taken


def _bits(bitmap: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.uint8]:
    """Elements `[start, stop)` of a bitmap as 0 and 1."""
    return np.unpackbits(bitmap[start // 8 : bitmap_nbytes(stop)], count=stop - start, bitorder=_LITTLE)


def _set_bits(bitmap: NDArray[np.uint8], start: int, marked: NDArray[np.bool_]) -> None:
    """Write elements from `start` on; a multiple of 8."""
    bitmap[start // 8 : bitmap_nbytes(start + marked.size)] = np.packbits(marked, bitorder=_LITTLE)


class NumpyBackend:
    """`Backend` for CPU tensors; needs nothing but numpy.

    On one thread: the calls for a block are so short that a second thread would mostly wait for the interpreter lock.
    """

    name = "numpy"

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`."""
        packer = _Packer(x, threshold)
        source = words(x)
        for start, stop in _blocks(x.numel()):
            packer.add(start, source[start:stop])
        return packer.result()

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        check_bitmap(bitmap, out.numel())
        check_count(bitmap, values)
        marks, kept, target = bitmap.numpy(), words(values), words(out)
        announce_temporary(block_nbytes(out))
        first = 0
        for start, stop in _blocks(out.numel()):
            positions = _positions(_bits(marks, start, stop))
            chunk = target[start:stop]
            chunk.fill(0)
            chunk[positions] = kept[first : first + positions.size]
            first += positions.size

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`."""
        check_bitmap(bitmap, dense.numel())
        marks, source = bitmap.numpy(), words(dense)
        pieces = [_take(source[start:stop], _bits(marks, start, stop)) for start, stop in _blocks(dense.numel())]
        return _join(pieces, of=dense)

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        clamp = _Clamp(x, out, low=low, high=high)
        for start, stop in _blocks(x.numel()):
            clamp(start, stop)
        return clamp.bitmap

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        check_bitmap(bitmap, grad.numel())
        if scale_off:
            _scale_by_bits(bitmap, grad.detach(), out=out.detach(), scale_off=scale_off)
            return
        marks, source, target = bitmap.numpy(), words(grad), words(out)
        for start, stop in _blocks(grad.numel()):
            # A product of words, not of floats: exact, and 0 where the float is infinite or NaN.
            np.multiply(source[start:stop], _bits(marks, start, stop), out=target[start:stop])


class _Packer:
    """Pack block after block."""

    def __init__(self, x: Tensor, threshold: float) -> None:
        self.limit = word(round_down(threshold, x.dtype), x.dtype)
        self.magnitude, self.source = magnitude_mask(x.dtype), x
        self.bitmap = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        self.marks = self.bitmap.numpy()
        self.pieces: list[Words] = []

    def add(self, start: int, chunk: Words) -> None:
        """Pack the block of elements from `start` on."""
        kept = (chunk & self.magnitude) > self.limit
        _set_bits(self.marks, start, kept)
        self.pieces.append(_take(chunk, kept))

    def result(self) -> tuple[Tensor, Tensor]:
        """Bitmap and values."""
        return self.bitmap, _join(self.pieces, of=self.source)


class _Clamp:
    """Clamp block after block, noting where gradients pass."""

    def __init__(self, x: Tensor, out: Tensor, *, low: float, high: float) -> None:
        self.source, self.target, self.dtype = words(x), words(out), x.dtype
        self.low, self.high = nearest(low, x.dtype), nearest(high, x.dtype)
        self.bitmap = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        self.marks = self.bitmap.numpy()

    @np.errstate(invalid="ignore")  # a signalling NaN is no reason to warn
    def __call__(self, start: int, stop: int) -> Words:
        """Clamp elements `[start, stop)`; returns their part of `out`."""
        source, target = self.source[start:stop], self.target[start:stop]
        values = floats(source, self.dtype)
        # The bits come first, for `target` may be `source`. Infinity is no bound; comparisons with NaN are false.
        below = values <= self.low if self.low != -math.inf else np.zeros(values.size, dtype=np.bool_)
        above = values >= self.high if self.high != math.inf else np.zeros(values.size, dtype=np.bool_)
        _set_bits(self.marks, start, ~(below | above))
        if source.itemsize > 2:
            np.clip(values, self.low, self.high, out=floats(target, self.dtype))
        else:  # what `floats` gave is a copy, so words are chosen instead of computed
            low, high = word(self.low, self.dtype), word(self.high, self.dtype)
            target[...] = np.where(below, low, np.where(above, high, source))
        return target


@np.errstate(all="ignore")  # overflow is infinity, as in torch
def _scale_by_bits(bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float) -> None:
    """`mask_by_bits` for a scale other than 0, rounded as torch rounds `grad * scale_off`."""
    marks, half = bitmap.numpy(), grad.dtype.itemsize == 2
    for start, stop in _blocks(grad.numel()):
        bits, chunk, target = _bits(marks, start, stop), grad[start:stop], out[start:stop]
        if half:  # torch multiplies in float32 and rounds once, which numpy does not
            target.copy_(torch.where(torch.from_numpy(bits.view(np.bool_)), chunk, chunk * scale_off))
        else:
            factors = np.array([scale_off, 1.0], dtype=chunk.numpy().dtype)
            np.multiply(chunk.numpy(), factors.take(bits), out=target.numpy())
