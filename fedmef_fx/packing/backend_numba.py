"""The kernels compiled by numba: several times the speed of numpy.

Serial loops that release the interpreter lock, run over spans by plain threads. Each kernel is compiled for a width
of words when it first meets it: 0.1 to 0.6 s each, seven kernels, with the import about 3 s for a float32 model, and
as long again for those of `ops`. numba keeps what it compiled in `__pycache__` or, where that is read-only, in the
user's cache folder (`NUMBA_CACHE_DIR` chooses another), so that the next process takes about a second.

A kernel that keeps values takes two passes, marks first and values second, so that the values get exactly the memory
they need: a single pass would have to allocate for the case that everything is kept.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.packing.backend_numpy import NumpyBackend, check_count
from fedmef_fx.packing.bitmap import bitmap_nbytes, check_bitmap, count_bits
from fedmef_fx.packing.layout import is_same_memory
from fedmef_fx.packing.spans import run_spans
from fedmef_fx.packing.words import Words, magnitude_mask, nearest, round_down, word, words

__all__ = ["NumbaBackend", "aligned_bytes", "compiled", "lowest_bit"]


Function = TypeVar("Function", bound=Callable[..., Any])
Bytes = NDArray[np.uint8]


def compiled(*, reassociate: bool = False) -> Callable[[Function], Function]:
    """Compile a function when it first runs; without the interpreter lock, and kept for the next process.

    Args:
        reassociate: Whether sums may be taken in another order, which lets them run on vectors, and with products that
            are not rounded before they are added.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract"} if reassociate else False}

    def decorate(function: Function) -> Function:
        try:
            made = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no folder that the cache could be written to
            made = numba.njit(**options)(function)
        return cast("Function", made)

    return decorate


def _inlined(function: Function) -> Function:
    """Make a function a part of the compiled functions that call it, before they are optimised."""
    return cast("Function", numba.njit(nogil=True, inline="always")(function))


def _generate_lowest_bit(_typing: Any, _word: Any) -> Any:
    """Index of the lowest set bit of a word other than 0: one machine instruction, which numba has no name for."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        undefined_for_zero = context.get_constant(types.boolean, True)
        return builder.cttz(args[0], undefined_for_zero)

    return types.uint64(types.uint64), generate


# numba passes the first argument itself, which its annotations do not say
lowest_bit = cast("Callable[[Any], Any]", intrinsic(_generate_lowest_bit))


# The inner loops over 8 elements have no branches and a constant length, which is the shape that LLVM turns into one
# vector comparison per byte of a bitmap. Unsigned shifts everywhere: signed ones keep it from doing so.


@compiled()
def _mark(source: Words, magnitude: Any, limit: Any, bitmap: Bytes) -> None:
    """Set the bit of every element with a magnitude above `limit`."""
    whole = source.size // 8
    for i in range(whole):
        bits = np.uint32(0)
        for j in range(8):
            bits |= np.uint32((source[i * 8 + j] & magnitude) > limit) << np.uint32(j)
        bitmap[i] = bits
    if whole < bitmap.size:
        bits = np.uint32(0)
        for k in range(whole * 8, source.size):
            bits |= np.uint32((source[k] & magnitude) > limit) << np.uint32(k & 7)
        bitmap[whole] = bits


@compiled()
def _compress(source: Words, bitmap: Bytes, values: Words) -> None:
    """Copy the marked elements of `source` to `values`."""
    marks = bitmap[: bitmap.size // 8 * 8].view(np.uint64)
    whole = min(marks.size, source.size // 64)
    count = 0
    for i in range(whole):
        rest = marks[i]
        while rest:
            values[count] = source[i * 64 + np.int64(lowest_bit(rest))]
            count += 1
            rest &= rest - np.uint64(1)
    for k in range(whole * 64, source.size):
        if (bitmap[k >> 3] >> (k & 7)) & 1:
            values[count] = source[k]
            count += 1


@compiled()
def _expand(bitmap: Bytes, values: Words, out: Words) -> None:
    """Copy `values` to the marked elements of `out`, and 0 to the others."""
    marks = bitmap[: bitmap.size // 8 * 8].view(np.uint64)
    whole = min(marks.size, out.size // 64)
    count = 0
    for i in range(whole):
        for j in range(64):
            out[i * 64 + j] = 0
        rest = marks[i]
        while rest:
            out[i * 64 + np.int64(lowest_bit(rest))] = values[count]
            count += 1
            rest &= rest - np.uint64(1)
    for k in range(whole * 64, out.size):
        out[k] = 0
        if (bitmap[k >> 3] >> (k & 7)) & 1:
            out[k] = values[count]
            count += 1


@_inlined
def _select(bitmap: Bytes, source: Words, out: Words) -> None:
    """`out = source` where marked, else 0."""
    whole = source.size // 8
    for i in range(whole):
        bits = np.uint64(bitmap[i])
        for j in range(8):
            # all ones where marked: a product by 0 or 1 takes vectors twice as long
            out[i * 8 + j] = source[i * 8 + j] & (np.uint64(0) - ((bits >> np.uint64(j)) & np.uint64(1)))
    for k in range(whole * 8, source.size):
        out[k] = source[k] * ((bitmap[k >> 3] >> (k & 7)) & 1)


@_inlined
def _clamp(source: Any, low: Any, high: Any, out: Any, bitmap: Bytes) -> None:
    """Clamp, marking what lies inside; a bound that is NaN never stops anything."""
    whole = source.size // 8
    for i in range(whole):
        bits = np.uint32(0)
        for j in range(8):
            value = source[i * 8 + j]
            below, above = value <= low, value >= high
            out[i * 8 + j] = low if below else (high if above else value)
            bits |= np.uint32(not (below or above)) << np.uint32(j)
        bitmap[i] = bits
    if whole < bitmap.size:
        bits = np.uint32(0)
        for k in range(whole * 8, source.size):
            value = source[k]
            below, above = value <= low, value >= high
            out[k] = low if below else (high if above else value)
            bits |= np.uint32(not (below or above)) << np.uint32(k & 7)
        bitmap[whole] = bits


# Compiled twice: where both arrays are known to be one, loops run on vectors; where they just turn out to be, the check
# for overlap sends them down the scalar path, twenty times as slow.


@compiled()
def _select_into(bitmap: Bytes, source: Words, out: Words) -> None:
    _select(bitmap, source, out)


@compiled()
def _select_in_place(bitmap: Bytes, data: Words) -> None:
    _select(bitmap, data, data)


@compiled()
def _clamp_into(source: Any, low: Any, high: Any, out: Any, bitmap: Bytes) -> None:
    _clamp(source, low, high, out, bitmap)


@compiled()
def _clamp_in_place(data: Any, low: Any, high: Any, bitmap: Bytes) -> None:
    _clamp(data, low, high, data, bitmap)


def aligned_bytes(bitmap: Tensor) -> Bytes:
    """The bytes of a bitmap at an address from which the kernels may read words of 8 bytes."""
    aligned: Bytes = (bitmap if bitmap.data_ptr() % 8 == 0 else bitmap.clone()).numpy()
    return aligned


class NumbaBackend:
    """`Backend` for CPU tensors, compiled; what it has no kernel for it leaves to numpy."""

    name = "numba"

    def __init__(self) -> None:
        self._numpy = NumpyBackend()

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`."""
        limit, magnitude = word(round_down(threshold, x.dtype), x.dtype), magnitude_mask(x.dtype)
        source = words(x)
        bitmap = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        marks = bitmap.numpy()
        run_spans(
            x.numel(),
            lambda start, stop: _mark(source[start:stop], magnitude, limit, marks[start // 8 : bitmap_nbytes(stop)]),
        )
        return bitmap, self.gather(bitmap, x)

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        check_bitmap(bitmap, out.numel())
        check_count(bitmap, values)
        marks, kept, target = aligned_bytes(bitmap), words(values), words(out)

        def span(start: int, stop: int) -> None:
            first = count_bits(marks[: start // 8]) if start else 0
            _expand(marks[start // 8 : bitmap_nbytes(stop)], kept[first:], target[start:stop])

        run_spans(out.numel(), span)

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`."""
        check_bitmap(bitmap, dense.numel())
        marks, source = aligned_bytes(bitmap), words(dense)
        values = torch.empty(count_bits(marks), dtype=dense.dtype)
        target = words(values)

        def span(start: int, stop: int) -> None:
            first = count_bits(marks[: start // 8]) if start else 0
            _compress(source[start:stop], marks[start // 8 : bitmap_nbytes(stop)], target[first:])

        run_spans(dense.numel(), span)
        return values

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        if x.dtype.itemsize == 2:  # no arithmetic for 16-bit floats in numba
            return self._numpy.clamp_bits(x, out=out, low=low, high=high)
        bitmap = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        run_spans(x.numel(), _clamper(x, out, bitmap, low=low, high=high))
        return bitmap

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        if scale_off:
            self._numpy.mask_by_bits(bitmap, grad, out=out, scale_off=scale_off)
            return
        check_bitmap(bitmap, grad.numel())
        marks, target = bitmap.numpy(), words(out)
        source = None if is_same_memory(grad, out) else words(grad)

        def span(start: int, stop: int) -> None:
            own = marks[start // 8 : bitmap_nbytes(stop)]
            if source is None:
                _select_in_place(own, target[start:stop])
            else:
                _select_into(own, source[start:stop], target[start:stop])

        run_spans(grad.numel(), span)


def _clamper(x: Tensor, out: Tensor, bitmap: Tensor, *, low: float, high: float) -> Callable[[int, int], None]:
    """`_clamp` on elements `[start, stop)`."""
    target, marks = out.detach().numpy(), bitmap.numpy()
    source = None if is_same_memory(x, out) else x.detach().numpy()
    scalar = target.dtype.type
    floor, ceiling = nearest(low, x.dtype), nearest(high, x.dtype)
    least = scalar(math.nan if floor == -math.inf else floor)
    most = scalar(math.nan if ceiling == math.inf else ceiling)

    def clamp(start: int, stop: int) -> None:
        own = marks[start // 8 : bitmap_nbytes(stop)]
        if source is None:
            _clamp_in_place(target[start:stop], least, most, own)
        else:
            _clamp_into(source[start:stop], least, most, target[start:stop], own)

    return clamp
