"""The kernels in numpy, block by block so that temporaries stay in the cache and never have the size of the tensor."""

import math
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.memory.bitmap import bitmap_nbytes, check_bitmap, count_bits
from fedmef_fx.memory.spans import BLOCK, run_spans
from fedmef_fx.memory.words import Words, floats, magnitude_mask, nearest, round_down, word, words

__all__ = ["NumpyBackend", "check_count"]

_LITTLE: Final = "little"


def check_count(bitmap: Tensor, values: Tensor) -> None:
    """Refuse values that do not belong to a bitmap, before a kernel reads beyond them.

    Raises:
        ValueError: As many values as set bits are needed.
    """
    marked = count_bits(bitmap.numpy())
    if values.numel() != marked:
        raise ValueError(f"unpack: got {values.numel()} values; expected one per set bit, that is {marked}")


def _join(spans: list[list[Words]], dtype: torch.dtype) -> Tensor:
    """The pieces of all spans as one tensor that torch allocated, so that memory trackers see it."""
    pieces = [piece for span in spans for piece in span]
    values = torch.empty(sum(piece.size for piece in pieces), dtype=dtype)
    if pieces:
        np.concatenate(pieces, out=words(values))
    return values


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
    """`Backend` for CPU tensors; needs nothing but numpy."""

    name = "numpy"

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`."""
        limit = word(round_down(threshold, x.dtype), x.dtype)
        source, magnitude = words(x), magnitude_mask(x.dtype)
        bitmap = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        marks = bitmap.numpy()

        def span(start: int, stop: int) -> list[Words]:
            pieces = []
            for at in range(start, stop, BLOCK):
                chunk = source[at : min(at + BLOCK, stop)]
                kept = (chunk & magnitude) > limit
                _set_bits(marks, at, kept)
                pieces.append(_take(chunk, kept))
            return pieces

        return bitmap, _join(run_spans(x.numel(), span), x.dtype)

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        check_bitmap(bitmap, out.numel())
        check_count(bitmap, values)
        marks, kept, target = bitmap.numpy(), words(values), words(out)

        def span(start: int, stop: int) -> None:
            first = count_bits(marks[: start // 8])
            for at in range(start, stop, BLOCK):
                chunk = target[at : min(at + BLOCK, stop)]
                positions = _positions(_bits(marks, at, at + chunk.size))
                chunk.fill(0)
                chunk[positions] = kept[first : first + positions.size]
                first += positions.size

        run_spans(out.numel(), span)

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`."""
        check_bitmap(bitmap, dense.numel())
        marks, source = bitmap.numpy(), words(dense)

        def span(start: int, stop: int) -> list[Words]:
            edges = [(at, min(at + BLOCK, stop)) for at in range(start, stop, BLOCK)]
            return [_take(source[at:end], _bits(marks, at, end)) for at, end in edges]

        return _join(run_spans(dense.numel(), span), dense.dtype)

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        clamp = _Clamp(x, out, low=low, high=high)
        run_spans(x.numel(), lambda start, stop: [clamp(at, stop) for at in range(start, stop, BLOCK)])
        return clamp.bitmap

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        check_bitmap(bitmap, grad.numel())
        if scale_off:
            _scale_by_bits(bitmap, grad.detach(), out=out.detach(), scale_off=scale_off)
            return
        marks, source, target = bitmap.numpy(), words(grad), words(out)

        def span(start: int, stop: int) -> None:
            for at in range(start, stop, BLOCK):
                end = min(at + BLOCK, stop)
                # A product of words, not of floats: exact, and 0 where the float is infinite or NaN.
                np.multiply(source[at:end], _bits(marks, at, end), out=target[at:end])

        run_spans(grad.numel(), span)

    def clamp_pack(
        self, x: Tensor, *, out: Tensor, threshold: float, low: float = 0.0, high: float = math.inf
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.clamp_pack`."""
        limit = word(round_down(threshold, x.dtype), x.dtype)
        magnitude = magnitude_mask(x.dtype)
        clamp = _Clamp(x, out, low=low, high=high)
        bitmap = torch.empty_like(clamp.bitmap)
        marks = bitmap.numpy()

        def span(start: int, stop: int) -> list[Words]:
            pieces = []
            for at in range(start, stop, BLOCK):
                chunk = clamp(at, stop)
                kept = (chunk & magnitude) > limit
                _set_bits(marks, at, kept)
                pieces.append(_take(chunk, kept))
            return pieces

        return clamp.bitmap, bitmap, _join(run_spans(x.numel(), span), x.dtype)


class _Clamp:
    """Clamp block after block, noting where gradients pass."""

    def __init__(self, x: Tensor, out: Tensor, *, low: float, high: float) -> None:
        self.source, self.target, self.dtype = words(x), words(out), x.dtype
        self.low, self.high = nearest(low, x.dtype), nearest(high, x.dtype)
        self.low_word, self.high_word = word(low, x.dtype), word(high, x.dtype)
        self.bitmap = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        self.marks = self.bitmap.numpy()

    def __call__(self, at: int, stop: int) -> Words:
        """Clamp the block at `at`; returns its part of `out`."""
        end = min(at + BLOCK, stop)
        source, target = self.source[at:end], self.target[at:end]
        values = floats(source, self.dtype)
        # The bits come first, for `target` may be `source`. Infinity is no bound; comparisons with NaN are false.
        below = values <= self.low if self.low != -math.inf else np.zeros(values.size, dtype=np.bool_)
        above = values >= self.high if self.high != math.inf else np.zeros(values.size, dtype=np.bool_)
        _set_bits(self.marks, at, ~(below | above))
        if source.itemsize > 2:
            np.clip(values, self.low, self.high, out=floats(target, self.dtype))
            return target
        target[...] = np.where(below, self.low_word, np.where(above, self.high_word, source))
        return target


def _scale_by_bits(bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float) -> None:
    """`mask_by_bits` for a scale other than 0, rounded as torch rounds `grad * scale_off`."""
    marks, dtype = bitmap.numpy(), grad.dtype
    half = dtype.itemsize == 2

    def span(start: int, stop: int) -> None:
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            bits, chunk = _bits(marks, at, end), grad[at:end]
            if half:  # torch multiplies in float32 and rounds once, which numpy does not
                out[at:end] = torch.where(torch.from_numpy(bits).bool(), chunk, chunk * scale_off)
            else:
                factors = np.array([scale_off, 1.0], dtype=chunk.numpy().dtype)
                np.multiply(chunk.numpy(), factors.take(bits), out=out[at:end].numpy())

    run_spans(grad.numel(), span)
