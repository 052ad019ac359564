"""Blocks that carry their exceptions themselves: what is stored has one size whatever the values, so nobody waits.

`BlockwiseTensor` asks on the CPU whether all elements are finite, and keeps more where one is not. Elsewhere the answer
would make the host wait for the device, and a trace has none. There each block decides for itself: one with NaN or
infinities is marked by NaN in the place of its first parameter. Its second is then the middle of its finite elements,
which all of these decode to, and its codes are kinds: 0 finite, 1 NaN, 2 and 3 the infinities (with 1 bit a code, 1 for
all three, decoded to NaN). Every other block is coded as on the CPU, bit for bit.

Elements beyond 2 ** 126 (2 ** 1022 in float64) are taken for that number, with their sign, so that no range overflows.
Codes that a trace made are to be decoded in it: outside of it a marked block is NaN.
"""

import math
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.packing.block_code import BlockCode, decode_levels, encode_levels
from fedmef_fx.packing.tracers import is_exported, is_traced

__all__ = ["decode_marked", "encode_marked", "largest_coded", "marks_exceptions"]

_LARGEST: Final = {torch.float32: 2.0**126, torch.float64: 2.0**1022}


def marks_exceptions(x: Tensor) -> bool:
    """Whether blocks of a tensor carry their exceptions: on every device but the CPU, and while traced.

    Not in what is exported: that is for inference, which codes nothing.
    """
    return x.device.type != "cpu" or (is_traced() and not is_exported())


def largest_coded(dtype: torch.dtype) -> float:
    """The largest magnitude that is told from greater ones."""
    return min(torch.finfo(dtype).max, _LARGEST[torch.promote_types(dtype, torch.float32)])


def encode_marked(x: Tensor, code: BlockCode, parameters: Tensor, noise: Tensor | None) -> Tensor:
    """`encode_levels` that takes any values.

    Args:
        x: `[blocks, size]`.
        code: How.
        parameters: `[blocks, code.parameters]`, of `code.parameter_dtype`; written to.
        noise: Of x's shape, for stochastic rounding; None for nearest.

    Returns:
        uint8 `[blocks, size]`.
    """
    finite, limit = x.isfinite(), largest_coded(x.dtype)
    marked = ~finite.all(1, keepdim=True)
    # Where all elements of a block are finite nothing changes.
    values = torch.where(finite, x, 0.0).clamp_(-limit, limit)
    codes = encode_levels(values, code, parameters, noise, is_checked=True)
    assert codes is not None  # noqa: S101  # None is for what was not checked
    wide = torch.promote_types(x.dtype, torch.float32)
    highest = torch.where(finite, values, -limit).amax(1, keepdim=True).to(wide)
    lowest = torch.where(finite, values, limit).amin(1, keepdim=True).to(wide)
    middle = torch.where(finite.any(1, keepdim=True), lowest / 2 + highest / 2, 0.0)
    parameters[:, 1:2] = torch.where(marked, middle, parameters[:, 1:2].to(wide))
    parameters[:, :1].masked_fill_(marked, math.nan)
    kinds = x.isnan().to(torch.uint8) + (x == math.inf).to(torch.uint8) * 2 + (x == -math.inf).to(torch.uint8) * 3
    return torch.where(marked, kinds.clamp_(max=2**code.bits - 1), codes)


def decode_marked(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor) -> None:
    """`decode_levels` for what `encode_marked` made.

    Args:
        codes: uint8 `[blocks, size]`.
        code: How they were made.
        parameters: `[blocks, code.parameters]`, in a type that `out` is computed in.
        out: `[blocks, size]`.
    """
    decode_levels(codes, code, parameters, out)
    limit = torch.finfo(out.dtype).max
    middle = parameters[:, 1:2].clamp(-limit, limit).to(out.dtype)
    exceptions = torch.where(codes == 1, math.nan, torch.where(codes == 2, math.inf, -math.inf)).to(out.dtype)
    marked = parameters[:, :1].isnan()
    out.copy_(torch.where(marked, torch.where(codes == 0, middle, exceptions), out))
