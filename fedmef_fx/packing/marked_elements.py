"""Codes of the elements that a bitmap marks, and of no others, as if these lay one after another.

The kernels in C read them where they are, and decode them to where they belong; elsewhere they are gathered first.
"""

import numpy as np
import torch
from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.packing import native_blocks
from fedmef_fx.packing.backends import backend_for
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.blockwise import BlockwiseTensor, empty_buffers, fused_for
from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.noise import noise_key
from fedmef_fx.packing.words import word

__all__ = ["encode_marked", "fill_places", "places_of", "unpack_marked"]


def encode_marked(
    flat: Tensor, bitmap: Tensor, code: BlockCode, *, key: int | None = None, expected_count: int = 0
) -> BlockwiseTensor:
    """Encode the marked elements of a tensor.

    Args:
        flat: `[n]`, contiguous.
        bitmap: uint8 `[ceil(n / 8)]`.
        code: How.
        key: Of the noise of stochastic rounding; None draws one.
        expected_count: Elements that a tensor without values (meta or fake) is taken to mark.
    """
    is_native = fused_for(flat, code) is native_blocks
    if has_no_values(flat):
        if not is_native:
            return BlockwiseTensor.encode(flat.new_empty(expected_count), code, key=key)
        return BlockwiseTensor(*empty_buffers(flat, expected_count, code), _line(expected_count), flat.dtype, code)
    if is_native:
        if code.rounding == "stochastic" and key is None:
            key = noise_key(int(torch.randint(2**62, ())))
        count = native_blocks.count_marked(bitmap, flat.numel())
        codes, ranges = empty_buffers(flat, count, code)
        own_key = None if code.rounding == "nearest" else key
        if native_blocks.pack_marked(flat, bitmap, count, code, codes, ranges, key=own_key):
            return BlockwiseTensor(codes, ranges, _line(count), flat.dtype, code)
    return BlockwiseTensor.encode(backend_for(flat).gather(bitmap, flat), code, key=key)


def unpack_marked(values: BlockwiseTensor, bitmap: Tensor, out: Tensor, *, numel: int, start: int = 0) -> None:
    """Decode to the marked elements of a tensor, and write 0 to the others.

    Args:
        values: What `encode_marked` made, or a code of the elements that the bitmap marks.
        bitmap: uint8 `[ceil(n / 8)]`.
        out: Contiguous, of the dtype of the values: the elements from `start` on, or some of them.
        numel: n.
        start: A multiple of `marked_grain`, which only 0 is where that is 0; then `out` is `[n]`.
    """
    if marked_grain(values) == 0:
        backend_for(out).unpack(bitmap, values.unpack(), out=out)
    elif not has_no_values(out):
        native_blocks.unpack_marked(
            values.codes, values.code, values.ranges, values.shape.numel(), bitmap, out, numel=numel, start=start
        )


def marked_grain(values: BlockwiseTensor) -> int:
    """The `part_grain` of marked elements in a code: a word of the bitmap, where the kernels in C decode."""
    is_native = not values.has_exceptions and fused_for(values.codes, values.code) is native_blocks
    return native_blocks.WORD if is_native else 0


def places_within(places: Tensor, start: int, stop: int) -> Tensor:
    """Those of the places that `places_of` found that lie in [start, stop), counted from start, a multiple of 8."""
    if places.dtype == torch.uint8:
        return places[start // 8 : bitmap_nbytes(stop)]
    if has_no_values(places):
        return places
    ends = places.numpy() if places.device.type == "cpu" else places.cpu().numpy()
    first, last = (int(np.searchsorted(ends, np.int32(end))) for end in (start, stop))
    return places[first:last] - start if start else places[:last]


def places_of(value: float, flat: Tensor) -> Tensor | None:
    """Where a tensor has a value, in as few bytes as either form takes.

    Args:
        value: A number.
        flat: `[n]`, contiguous.

    Returns:
        int32 positions, or a uint8 bitmap; None where it does nowhere.
    """
    numel = flat.numel()
    # 0 is two words.
    if value == 0 or fused_for(flat, BlockCode()) is not native_blocks:
        marked = flat == value
        positions = marked.nonzero()[:, 0]
        if positions.numel() == 0:
            return None
        return positions.to(torch.int32) if _fits(positions.numel(), numel) else pack_bits(marked)
    bitmap = torch.empty(bitmap_nbytes(numel), dtype=torch.uint8)
    pattern = int(word(value, flat.dtype))
    count = call("mark_equal", flat.dtype.itemsize, flat, pattern, bitmap, numel, threads_for(numel))
    if count == 0 or not _fits(count, numel):
        return bitmap if count else None
    at = torch.empty(count, dtype=torch.int32)
    call("positions", bitmap, numel, at)
    return at


def fill_places(places: Tensor, value: float, flat: Tensor) -> None:
    """Write a value to places that `places_of` found."""
    is_bitmap = places.dtype == torch.uint8
    if has_no_values(flat) or fused_for(flat, BlockCode()) is not native_blocks:
        if is_bitmap:
            flat.masked_fill_(unpack_bits(places, flat.numel()), value)
        else:
            flat.index_fill_(0, places.long(), value)
        return
    pattern = int(word(value, flat.dtype))
    if is_bitmap:
        call("fill_marked", flat.dtype.itemsize, places, pattern, flat, flat.numel())
    else:
        call("fill_at", flat.dtype.itemsize, places, places.numel(), pattern, flat)


def _fits(count: int, numel: int) -> bool:
    """Whether positions take fewer bytes than a bitmap."""
    return numel < 2**31 and 4 * count < bitmap_nbytes(numel)


def _line(count: int) -> MemoryLayout:
    return MemoryLayout((count,), (1,))
