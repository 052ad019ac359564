"""One kernel each to code and to decode blocks, in Triton: the bits of `marked_blocks`, without temporaries.

A program takes one block. It reads it once for its range, and once more, from the cache, for each plane of its codes,
in the order in which a byte holds them. Floats are multiplied and added one by one, never fused, as torch does.

Imported where Triton is there alone (`fedmef_fx.packing.triton_choice`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.marked_blocks import largest_coded

__all__ = ["bfloat16_nearest", "load_float32", "pack_blocks", "unpack_blocks", "words"]

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def pack_blocks(
    x: Tensor, code: BlockCode, codes: Tensor, parameters: Tensor, *, key: int | None, start: int = 0
) -> bool:
    """Code a tensor.

    Args:
        x: `[n]`, contiguous; float16, bfloat16 or float32.
        code: How; with levels in a range.
        codes: uint8 `[code.codes_nbytes(n)]`, or longer; written to.
        parameters: `[code.blocks(n), 2]`, or longer, of `code.parameter_dtype`; written to.
        key: Of the noise of stochastic rounding; None for nearest.
        start: The number of the first element, a multiple of the block.

    Returns:
        True: every block takes any values.
    """
    if not x.numel():
        return True
    low, high = (0, 0) if key is None else (_signed(key), _signed(key >> 32))
    with torch.cuda.device_of(x):
        _pack[(code.blocks(x.numel()),)](
            words(x), codes, words(parameters), x.numel(), start, low, high,
            BITS=code.bits, BLOCK=code.block, WIDTH=triton.next_power_of_2(code.block), IS_NEAREST=key is None,
            LIMIT=largest_coded(x.dtype), IS_BFLOAT16=x.dtype == torch.bfloat16,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return True


def unpack_blocks(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor) -> None:
    """Decode what `pack_blocks` coded.

    Args:
        codes: uint8 `[code.codes_nbytes(n)]`.
        code: How they were made.
        parameters: `[code.blocks(n), 2]`.
        out: `[n]`, contiguous; float16, bfloat16 or float32.
    """
    if not out.numel():
        return
    with torch.cuda.device_of(out):
        _unpack[(code.blocks(out.numel()),)](
            codes, words(parameters), words(out), out.numel(),
            BITS=code.bits, BLOCK=code.block, WIDTH=triton.next_power_of_2(code.block),
            LIMIT=torch.finfo(out.dtype).max, IS_BFLOAT16=out.dtype == torch.bfloat16,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def words(numbers: Tensor) -> Tensor:
    """Numbers in bfloat16 as integers: kernels convert and round them themselves, the same everywhere."""
    return numbers.view(torch.int16) if numbers.dtype == torch.bfloat16 else numbers


def _signed(word: int) -> int:
    """The signed integer with the lower 32 bits of a number."""
    word &= 0xFFFF_FFFF
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def _bfloat16(words):
    """The numbers of 16-bit patterns."""
    return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_float32(x, at, is_inside, IS_BFLOAT16: tl.constexpr):
    """Elements in float32, 0 outside."""
    if IS_BFLOAT16:
        values = _bfloat16(tl.load(x + at, mask=is_inside, other=0))
    else:
        values = tl.load(x + at, mask=is_inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _bfloat16_below(x):
    """The pattern of the largest bfloat16 not above x, which is finite."""
    bits = x.to(tl.int32, bitcast=True)
    below = ((bits >> 16) & 0xFFFF) + ((bits < 0) & ((bits & 0xFFFF) != 0)).to(tl.int32)
    return tl.where(below == 0xFF80, 0xFF7F, below)  # not -inf


@triton.jit
def bfloat16_nearest(x):
    """The pattern of the bfloat16 nearest to x; infinities and NaN stay."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _is_nan(x):
    return x != x  # noqa: PLR0124


@triton.jit
def _noise(number, key_low, key_high):
    """See `fedmef_fx.packing.noise`."""
    word = (number >> 1).to(tl.uint32) ^ key_low.to(tl.uint32)
    word = ((word ^ (word >> 16)) * 0x7FEB352D) ^ key_high.to(tl.uint32)
    word = (word ^ (word >> 15)) * 0x846CA68B
    word = word ^ (word >> 16)
    half = tl.where((number & 1) == 0, word & 0xFFFF, word >> 16)
    return (half.to(tl.float32) + 0.5) * 0.0000152587890625  # 1 / 65536


@triton.jit
def _pack_plane(
    x_at, out, start, size, low, inverse, is_marked, key_low, key_high,
    BITS: tl.constexpr, WIDTH: tl.constexpr, IS_NEAREST: tl.constexpr, LIMIT: tl.constexpr,
    IS_BFLOAT16: tl.constexpr, PLANE: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Write PLANE bits of each code, from bit LOWEST on."""
    width = (size * PLANE + 7) // 8
    row, column = tl.arange(0, 8 // PLANE)[:, None], tl.arange(0, WIDTH * PLANE // 8)[None, :]
    at = row * width + column
    is_inside = (column < width) & (at < size)
    x = load_float32(x_at, at, is_inside, IS_BFLOAT16)
    is_finite = _is_finite(x)
    kind = tl.where(is_finite, 0, tl.where(_is_nan(x), 1, tl.where(x > 0, 2, 3)))
    x = tl.minimum(tl.maximum(tl.where(is_finite, x, 0.0), -LIMIT), LIMIT)
    noise = 0.5 if IS_NEAREST else _noise(start + at, key_low, key_high)
    steps = (x - low) * inverse + noise
    code = tl.minimum(tl.maximum(steps, 0.0), 2.0**BITS - 1).to(tl.int32)
    code = tl.where(is_marked, tl.minimum(kind, 2**BITS - 1), code)
    share = tl.where(is_inside, ((code >> LOWEST) & (2**PLANE - 1)) << (PLANE * row), 0)
    byte = tl.arange(0, WIDTH * PLANE // 8)
    tl.store(out + byte, tl.sum(share, axis=0).to(tl.uint8), mask=byte < width)


@triton.jit(do_not_specialize=["numel", "first", "key_low", "key_high"])
def _pack(
    x, codes, parameters, numel, first, key_low, key_high,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, IS_NEAREST: tl.constexpr, LIMIT: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    size = tl.minimum(numel - start, BLOCK).to(tl.int32)
    at = tl.arange(0, WIDTH)
    is_inside = at < size
    values = load_float32(x + start, at, is_inside, IS_BFLOAT16)
    is_finite = _is_finite(values)
    counted = is_inside & is_finite
    clamped = tl.minimum(tl.maximum(tl.where(is_finite, values, 0.0), -LIMIT), LIMIT)
    lowest = tl.min(tl.where(counted, clamped, LIMIT), axis=0)
    highest = tl.max(tl.where(counted, clamped, -LIMIT), axis=0)
    count = tl.sum(counted.to(tl.int32), axis=0)
    is_marked = count < size
    middle = tl.where(count > 0, lowest * 0.5 + highest * 0.5, 0.0)
    if BITS == 8:
        low = lowest
        scale = tl.div_rn(highest - lowest, 255.0)
        scale = tl.where(scale < _TINY, 0.0, scale)
        tl.store(parameters + 2 * block, tl.where(is_marked, float("nan"), low))
        tl.store(parameters + 2 * block + 1, tl.where(is_marked, middle, scale))
    else:
        low_word = _bfloat16_below(lowest)
        low = _bfloat16(low_word)
        scale = -_bfloat16(_bfloat16_below(tl.div_rn(low - highest, 2.0**BITS - 1)))
        scale = tl.where(scale < _TINY, 0.0, scale)
        scale_word = tl.where(is_marked, bfloat16_nearest(middle), bfloat16_nearest(scale))
        tl.store(parameters + 2 * block, tl.where(is_marked, 0x7FC0, low_word).to(tl.int16))
        tl.store(parameters + 2 * block + 1, scale_word.to(tl.int16))
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))
    out = codes + block * (BLOCK * BITS // 8)
    if BITS == 3:
        _pack_plane(
            x + start, out, first + start, size, low, inverse, is_marked, key_low, key_high,
            BITS, WIDTH, IS_NEAREST, LIMIT, IS_BFLOAT16, 2, 0,
        )  # fmt: skip
        _pack_plane(
            x + start, out + (size * 2 + 7) // 8, first + start, size, low, inverse, is_marked, key_low, key_high,
            BITS, WIDTH, IS_NEAREST, LIMIT, IS_BFLOAT16, 1, 2,
        )  # fmt: skip
    else:
        _pack_plane(
            x + start, out, first + start, size, low, inverse, is_marked, key_low, key_high,
            BITS, WIDTH, IS_NEAREST, LIMIT, IS_BFLOAT16, BITS, 0,
        )  # fmt: skip


@triton.jit
def _plane(codes, at, is_inside, size, PLANE: tl.constexpr):
    """The bits of elements in one plane."""
    width = (size * PLANE + 7) // 8
    byte = tl.load(codes + at % width, mask=is_inside, other=0).to(tl.int32)
    return (byte >> (PLANE * (at // width))) & (2**PLANE - 1)


@triton.jit(do_not_specialize=["numel"])
def _unpack(
    codes, parameters, out, numel,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LIMIT: tl.constexpr, IS_BFLOAT16: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK
    size = tl.minimum(numel - start, BLOCK).to(tl.int32)
    at = tl.arange(0, WIDTH)
    is_inside = at < size
    source = codes + block * (BLOCK * BITS // 8)
    if BITS == 3:
        upper = _plane(source + (size * 2 + 7) // 8, at, is_inside, size, 1)
        code = _plane(source, at, is_inside, size, 2) | (upper << 2)
    else:
        code = _plane(source, at, is_inside, size, BITS)
    first, second = tl.load(parameters + 2 * block), tl.load(parameters + 2 * block + 1)
    if BITS != 8:
        first, second = _bfloat16(first), _bfloat16(second)
    is_marked = _is_nan(first)
    values = tl.where(is_marked, second, code.to(tl.float32) * second + tl.where(is_marked, 0.0, first))
    values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT)
    special = tl.where(code == 1, float("nan"), tl.where(code == 2, float("inf"), float("-inf")))
    values = tl.where(is_marked, tl.where(code == 0, values, special), values)
    if IS_BFLOAT16:
        tl.store(out + start + at, bfloat16_nearest(values).to(tl.int16), mask=is_inside)
    else:
        tl.store(out + start + at, values.to(out.dtype.element_ty), mask=is_inside)
