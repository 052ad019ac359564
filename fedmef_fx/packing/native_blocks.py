"""Kernels in C that code and decode blocks: the bits of `fedmef_fx.packing.block_code`, without temporaries.

They stand in for its operations on the CPU, as `fedmef_fx.packing.fused` decides.
"""

from typing import Final, NoReturn

from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.packing.backend_native import FORMATS
from fedmef_fx.packing.bitmap import check_bitmap
from fedmef_fx.packing.block_code import BlockCode

__all__ = ["LARGEST_BLOCK", "WORD", "count_marked", "pack_blocks", "pack_marked", "unpack_blocks", "unpack_marked"]

LARGEST_BLOCK: Final = 4096
"""Elements of a block that kernels have room for."""

# What the kernel says of a bitmap that marks another number of elements.
_WRONG_COUNT: Final = 2

WORD: Final = 64
"""Elements of a bitmap that kernels look at together."""


def pack_blocks(
    x: Tensor, code: BlockCode, codes: Tensor, parameters: Tensor, *, key: int | None, start: int = 0
) -> bool:
    """Code a tensor.

    Args:
        x: `[n]`, contiguous.
        code: How; in blocks of at most `LARGEST_BLOCK`.
        codes: uint8 `[code.codes_nbytes(n)]`, or longer; written to.
        parameters: `[code.blocks(n), code.parameters]`, or longer, of `code.parameter_dtype`; written to.
        key: Of the noise of stochastic rounding; None for nearest.
        start: The number of the first element, a multiple of the block.

    Returns:
        False where an element is not finite, or a range overflows: what was written is then worth nothing.
    """
    numel, threads = x.numel(), threads_for(x.numel())
    _check(code, codes, parameters, x)
    arguments = (int(key is not None), key or 0, start, codes, parameters, threads)
    return not call("pack_blocks", FORMATS[x.dtype], x, numel, *_numbers(code), *arguments)


def unpack_blocks(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor) -> None:
    """Decode what `pack_blocks` coded.

    Args:
        codes: uint8 `[code.codes_nbytes(n)]`.
        code: How they were made.
        parameters: `[code.blocks(n), code.parameters]`.
        out: `[n]`, contiguous.
    """
    numel, threads = out.numel(), threads_for(out.numel())
    _check(code, codes, parameters, out)
    call("unpack_blocks", FORMATS[out.dtype], codes, parameters, *_numbers(code), out, numel, threads)


def count_marked(bitmap: Tensor, numel: int) -> int:
    """How many of so many elements are marked.

    Raises:
        ConfigError: The bitmap is not one of so many elements.
    """
    check_bitmap(bitmap, numel)
    return call("count", bitmap, numel)


def pack_marked(
    x: Tensor, bitmap: Tensor, count: int, code: BlockCode, codes: Tensor, parameters: Tensor, *, key: int | None
) -> bool:
    """Code the marked elements of a tensor, as if they lay one after another.

    Args:
        x: `[n]`, contiguous.
        bitmap: uint8 `[ceil(n / 8)]`.
        count: What `count_marked` says.
        code: As of `pack_blocks`.
        codes: As of `pack_blocks`, of `count` elements.
        parameters: As of `pack_blocks`, of `count` elements.
        key: Of the noise of stochastic rounding; None for nearest.

    Returns:
        False where a marked element is not finite, or a range overflows.
    """
    _check(code, codes, parameters, x, numel=count)
    check_bitmap(bitmap, x.numel())
    arguments = (*_numbers(code), int(key is not None), key or 0, codes, parameters, threads_for(x.numel()))
    found = call("pack_marked", FORMATS[x.dtype], bitmap, x, x.numel(), count, *arguments)
    if found == _WRONG_COUNT:
        _refuse_count(count, count_marked(bitmap, x.numel()))
    return found == 0


def unpack_marked(
    codes: Tensor,
    code: BlockCode,
    parameters: Tensor,
    count: int,
    bitmap: Tensor,
    out: Tensor,
    *,
    numel: int | None = None,
    start: int = 0,
) -> None:
    """Decode what `pack_marked` coded to the marked elements, and write 0 to the others.

    Args:
        codes: As of `unpack_blocks`, of `count` elements.
        code: How they were made.
        parameters: As of `unpack_blocks`, of `count` elements.
        count: Number of marked elements.
        bitmap: uint8 `[ceil(n / 8)]`.
        out: Contiguous; the elements from `start` on, or some of them.
        numel: n; None for what `out` has.
        start: A multiple of `WORD`.

    Raises:
        ValueError: The bitmap marks another number of elements, or `out` does not lie within them.
    """
    size = out.numel()
    numel = size if numel is None else numel
    _check(code, codes, parameters, out, numel=count)
    check_bitmap(bitmap, numel)
    if start < 0 or start % WORD or start + size > numel:
        raise ValueError(f"native blocks: got elements [{start}, {start + size}); expected some of {numel}")
    arguments = (codes, parameters, *_numbers(code), out, size, count, threads_for(size))
    marked = call("unpack_marked", FORMATS[out.dtype], bitmap, numel, start, *arguments)
    if marked != count:
        _refuse_count(count, marked)


def _numbers(code: BlockCode) -> tuple[int, int, int]:
    """A code as kernels take it, without its rounding."""
    return code.bits, code.block, int(code.levels == "centroids")


def _refuse_count(count: int, marked: int) -> NoReturn:
    raise ValueError(f"native blocks: got codes of {count} elements; expected one per set bit, that is {marked}")


def _check(code: BlockCode, codes: Tensor, parameters: Tensor, elements: Tensor, *, numel: int | None = None) -> None:
    """Refuse buffers that are too small, before a kernel reads or writes beyond them.

    Raises:
        ValueError: They do not belong to so many elements.
    """
    numel = elements.numel() if numel is None else numel
    nbytes, shape = code.codes_nbytes(numel), (code.blocks(numel), code.parameters)
    dtype = code.parameter_dtype(elements.dtype)
    if code.block > LARGEST_BLOCK:
        raise ValueError(f"native blocks: got {code}; expected blocks of at most {LARGEST_BLOCK}")
    has_room = codes.numel() >= nbytes and len(parameters) >= shape[0] and parameters.shape[1:] == shape[1:]
    if not has_room or parameters.dtype != dtype:
        raise ValueError(
            f"native blocks: got {codes.numel()} bytes of codes and {parameters.dtype}{list(parameters.shape)}; "
            f"expected {nbytes} and {dtype}{list(shape)} for {numel} elements"
        )
