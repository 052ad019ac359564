"""Bitmaps of GPU tensors in one kernel each, in Triton: what torch's operations do, without temporaries.

A program takes 1024 elements, the 128 bytes of their bits. Imported where Triton is there alone
(`fedmef_fx.packing.triton_choice`).
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedmef_fx.packing.backend_torch import TorchBackend
from fedmef_fx.packing.bitmap import bitmap_nbytes
from fedmef_fx.packing.triton_kernels import bfloat16_nearest, load_float32, words
from fedmef_fx.packing.words import nearest

__all__ = ["TritonBackend"]

_BYTES: Final = 128
_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


class TritonBackend(TorchBackend):
    """`Backend` for GPUs; in float64 operations of torch do."""

    name = "triton"

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        if x.dtype not in _DTYPES:
            return super().clamp_bits(x, out=out, low=low, high=high)
        x, out = x.detach(), out.detach()
        bitmap = x.new_empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
        if x.numel():
            with torch.cuda.device_of(x):
                _clamp_bits[(triton.cdiv(bitmap.numel(), _BYTES),)](
                    words(x), words(out), bitmap, x.numel(), nearest(low, x.dtype), nearest(high, x.dtype),
                    HAS_LOW=low != -math.inf, HAS_HIGH=high != math.inf, IS_BFLOAT16=x.dtype == torch.bfloat16,
                    BYTES=_BYTES,
                )  # fmt: skip
        return bitmap

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        if grad.dtype not in _DTYPES:
            super().mask_by_bits(bitmap, grad, out=out, scale_off=scale_off)
        elif grad.numel():
            grad, out = grad.detach(), out.detach()
            with torch.cuda.device_of(grad):
                _mask_by_bits[(triton.cdiv(bitmap.numel(), _BYTES),)](
                    bitmap, words(grad), words(out), grad.numel(), float(scale_off),
                    HAS_SCALE=scale_off != 0, IS_BFLOAT16=grad.dtype == torch.bfloat16, BYTES=_BYTES,
                )  # fmt: skip


@triton.jit
def _store(out, at, x, is_inside, IS_BFLOAT16: tl.constexpr):
    if IS_BFLOAT16:
        tl.store(out + at, bfloat16_nearest(x).to(tl.int16), mask=is_inside)
    else:
        tl.store(out + at, x.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _places(numel, BYTES: tl.constexpr):
    """The bytes of a program, its elements, and which of these there are."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    at = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    return byte, at, at < numel


@triton.jit(do_not_specialize=["numel", "low", "high"])
def _clamp_bits(
    x, out, bitmap, numel, low, high,
    HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, IS_BFLOAT16: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte, at, is_inside = _places(numel, BYTES)
    values = load_float32(x, at, is_inside, IS_BFLOAT16)
    passes = is_inside
    if HAS_LOW:
        passes = passes & ~(values <= low)
        values = tl.where(values <= low, low, values)
    if HAS_HIGH:
        passes = passes & ~(values >= high)
        values = tl.where(values >= high, high, values)
    _store(out, at, values, is_inside, IS_BFLOAT16)
    bits = tl.sum(passes.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bitmap + byte, bits.to(tl.uint8), mask=byte * 8 < numel)


@triton.jit(do_not_specialize=["numel", "scale"])
def _mask_by_bits(
    bitmap, grad, out, numel, scale,
    HAS_SCALE: tl.constexpr, IS_BFLOAT16: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    byte, at, is_inside = _places(numel, BYTES)
    bits = tl.load(bitmap + byte, mask=byte * 8 < numel, other=0).to(tl.int32)
    passes = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    values = load_float32(grad, at, is_inside, IS_BFLOAT16)
    # Without a scale not the product: infinity times zero would be NaN.
    off = values * scale if HAS_SCALE else tl.zeros_like(values)
    _store(out, at, tl.where(passes, values, off), is_inside, IS_BFLOAT16)
