"""The kernels in C (`fedmef_fx/native/src`): several times the speed of numpy, on as many threads as torch uses.

A kernel that keeps values takes two passes, marks first and values second, so that the values get exactly the memory
they need: a single pass would have to allocate for the case that everything is kept.
"""

import math
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.native import call, threads_for
from fedmef_fx.packing.bitmap import bitmap_nbytes, check_bitmap
from fedmef_fx.packing.words import check_float, magnitude_mask, nearest, round_down, word

__all__ = ["FORMATS", "NativeBackend"]

FORMATS: Final = MappingProxyType({torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3})
"""The numbers by which the kernels know dtypes."""


class NativeBackend:
    """`Backend` for CPU tensors, compiled."""

    name = "native"

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`."""
        limit, magnitude = word(round_down(threshold, x.dtype), x.dtype), magnitude_mask(x.dtype)
        bitmap, numel = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8), x.numel()
        call("mark", x.dtype.itemsize, x, int(magnitude), int(limit), bitmap, numel, threads_for(numel))
        return bitmap, _gathered(bitmap, x)

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        check_float(out.dtype)
        _check_same(values, out, "unpack")
        check_bitmap(bitmap, out.numel())
        marked = _count(bitmap, 8 * bitmap.numel())
        if values.numel() != marked:
            raise ValueError(f"unpack: got {values.numel()} values; expected one per set bit, that is {marked}")
        numel = out.numel()
        call("expand", out.dtype.itemsize, bitmap, values, out, numel, threads_for(numel))

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`."""
        check_float(dense.dtype)
        check_bitmap(bitmap, dense.numel())
        return _gathered(bitmap, dense)

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        check_float(x.dtype)
        _check_same(x, out, "clamp_bits", numel=x.numel())
        bitmap, numel = torch.empty(bitmap_nbytes(x.numel()), dtype=torch.uint8), x.numel()
        floor, ceiling = nearest(low, x.dtype), nearest(high, x.dtype)
        call(
            "clamp",
            FORMATS[x.dtype],
            x,
            math.nan if floor == -math.inf else floor,
            math.nan if ceiling == math.inf else ceiling,
            out,
            bitmap,
            numel,
            threads_for(numel),
        )
        return bitmap

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        check_float(grad.dtype)
        check_bitmap(bitmap, grad.numel())
        _check_same(grad, out, "mask_by_bits", numel=grad.numel())
        numel, threads = grad.numel(), threads_for(grad.numel())
        if scale_off:
            call("scale_unmarked", FORMATS[grad.dtype], bitmap, grad, scale_off, out, numel, threads)
            return
        call("select", grad.dtype.itemsize, bitmap, grad, out, numel, threads)


def _count(bitmap: Tensor, numel: int) -> int:
    return call("count", bitmap, numel)


def _gathered(bitmap: Tensor, dense: Tensor) -> Tensor:
    numel = dense.numel()
    values = torch.empty(_count(bitmap, numel), dtype=dense.dtype)
    call("compress", dense.dtype.itemsize, bitmap, dense, values, numel, threads_for(numel))
    return values


def _check_same(x: Tensor, other: Tensor, where: str, *, numel: int | None = None) -> None:
    """Refuse two tensors of different dtypes, or of which the second has not so many elements.

    Raises:
        ConfigError: They do not belong together.
    """
    if x.dtype != other.dtype or (numel is not None and other.numel() != numel):
        expected = f"{x.dtype}" if numel is None else f"{x.dtype}[{numel}]"
        raise ConfigError(f"{where}: got {other.dtype}{list(other.shape)}; expected {expected}")
