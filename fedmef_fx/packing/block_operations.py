"""Blocks coded and decoded by operations of torch, on any device: what fused kernels do, operation by operation.

`fedmef_fx.packing.native_blocks` and `fedmef_fx.packing.triton_kernels` have the same functions, and the same bits.
What is not finite on the CPU is coded here alone (`pack_wide`).
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.packing.bit_planes import pack_planes, planes_nbytes, unpack_planes
from fedmef_fx.packing.block_code import BlockCode, decode_levels, encode_levels
from fedmef_fx.packing.marked_blocks import decode_marked, encode_marked
from fedmef_fx.packing.noise import noise_at

__all__ = ["computed_in", "kinds_of", "pack_blocks", "pack_wide", "restore_kinds", "unpack_blocks", "unpack_wide"]

_KINDS: Final = (math.nan, math.inf, -math.inf)  # of kind 1, 2, 3


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a type are computed in."""
    return torch.promote_types(dtype, torch.float32)


def pack_blocks(
    x: Tensor,
    code: BlockCode,
    codes: Tensor,
    parameters: Tensor,
    *,
    key: int | None,
    start: int = 0,
    is_marked: bool = False,
) -> bool:
    """Code a tensor.

    Args:
        x: `[n]`, contiguous.
        code: How.
        codes: uint8 `[code.codes_nbytes(n)]`, or longer; written to.
        parameters: `[code.blocks(n), code.parameters]`, or longer, of `code.parameter_dtype`; written to.
        key: Of the noise of stochastic rounding; None for nearest.
        start: The number of the first element, a multiple of the block.
        is_marked: Whether blocks carry their exceptions themselves (`fedmef_fx.packing.marked_blocks`).

    Returns:
        False where an element is not finite, or a range overflows: what was written is then worth nothing. True where
        blocks carry that.
    """
    encode = encode_marked if is_marked else encode_levels
    noise = _noise(x, key, start, computed_in(x.dtype))
    for part, share, out, into in _parts(x, noise, code, codes, parameters):
        encoded = encode(part, code, into, share)
        if encoded is None:
            return False
        pack_planes(encoded, code.bits, out)
    return True


def pack_wide(
    x: Tensor, code: BlockCode, codes: Tensor, parameters: Tensor, *, key: int | None, start: int = 0
) -> None:
    """`pack_blocks` of what that refuses: NaN, infinities and ranges that overflow; in float64, quartered."""
    noise = _noise(x, key, start, torch.float64)
    for part, share, out, into in _parts(x, noise, code, codes, parameters):
        quarter = part.to(torch.float64) / 4
        finite = quarter.isfinite()
        low = torch.where(finite, quarter, math.inf).amin(1, keepdim=True)
        values = torch.where(finite, quarter, torch.where(low.isfinite(), low, 0.0))
        quarters = torch.empty_like(into)
        encoded = encode_levels(values, code, quarters, share, is_checked=True)
        assert encoded is not None  # noqa: S101  # None is for what was not checked
        pack_planes(encoded, code.bits, out)
        limit = torch.finfo(into.dtype).max
        into.copy_(quarters.to(torch.float64).mul_(4).clamp_(-limit, limit))


def unpack_blocks(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor, *, is_marked: bool = False) -> None:
    """Decode what `pack_blocks` coded.

    Args:
        codes: uint8 `[code.codes_nbytes(n)]`, or longer.
        code: How they were made.
        parameters: `[code.blocks(n), code.parameters]`, or longer.
        out: `[n]`, contiguous; written to.
        is_marked: Whether blocks carry their exceptions themselves.
    """
    decode = decode_marked if is_marked else decode_levels
    for part, packed, own in _in_blocks(out, code, codes, parameters):
        levels = unpack_planes(packed, part.shape[1], code.bits)
        decode(levels, code, own.to(computed_in(out.dtype)), part)


def unpack_wide(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor) -> None:
    """Decode what `pack_wide` coded, in quarters: the product with a range that overflows its format must not."""
    limit = torch.finfo(out.dtype).max
    for part, packed, own in _in_blocks(out, code, codes, parameters):
        values = torch.empty(part.shape, dtype=torch.float64, device=out.device)
        levels = unpack_planes(packed, part.shape[1], code.bits)
        decode_levels(levels, code, own.to(torch.float64).div_(4), values)
        part.copy_(values.mul_(4).clamp_(-limit, limit))


def kinds_of(flat: Tensor) -> Tensor:
    """The kind of every element, 2 bits each: 0 for finite ones, 1 for NaN, 2 and 3 for the infinities."""
    kinds = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
    for kind, found in enumerate((flat.isnan(), flat == math.inf, flat == -math.inf), start=1):
        kinds.masked_fill_(found, kind)
    packed = kinds.new_empty(1, planes_nbytes(kinds.numel(), 2))
    pack_planes(kinds.view(1, -1), 2, packed)
    return packed[0]


def restore_kinds(kinds: Tensor, flat: Tensor) -> None:
    """Write what is not finite, by the result of `kinds_of`."""
    unpacked = unpack_planes(kinds.view(1, -1), flat.numel(), 2)[0]
    for kind, value in enumerate(_KINDS, start=1):
        flat.masked_fill_(unpacked == kind, value)


def _noise(x: Tensor, key: int | None, start: int, dtype: torch.dtype) -> Tensor | None:
    return None if key is None else noise_at(key, start, x.numel(), dtype=dtype, device=x.device)


def _parts(
    x: Tensor, noise: Tensor | None, code: BlockCode, codes: Tensor, parameters: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """`_in_blocks` with the noise of its elements."""
    at = 0
    for part, out, into in _in_blocks(x, code, codes, parameters):
        yield part, None if noise is None else noise[at : at + part.numel()].view_as(part), out, into
        at += part.numel()


def _in_blocks(
    flat: Tensor, code: BlockCode, codes: Tensor, parameters: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A tensor as `[blocks, block]`, and what remains of it as `[1, rest]`, each with its codes and parameters."""
    whole, rest = divmod(flat.numel(), code.block)
    end, width = whole * code.block, planes_nbytes(code.block, code.bits)
    if whole:
        yield flat[:end].view(whole, -1), codes[: whole * width].view(whole, -1), parameters[:whole]
    if rest:
        last = codes[whole * width : whole * width + planes_nbytes(rest, code.bits)]
        yield flat[end:].view(1, -1), last.view(1, -1), parameters[whole : whole + 1]
