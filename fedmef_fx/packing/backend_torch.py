"""The kernels in torch operations alone: for devices other than the CPU.

The only synchronisation with the host is the one that learns how many elements were kept (`pack`, `gather`).
"""

import math

import torch
from torch import Tensor

from fedmef_fx.packing.bitmap import pack_bits, unpack_bits
from fedmef_fx.packing.words import check_float, nearest, round_down

__all__ = ["TorchBackend"]


class TorchBackend:
    """`Backend` for any device that torch knows."""

    name = "torch"

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`."""
        x = x.detach()
        kept = ~(x.abs() <= round_down(threshold, x.dtype))
        return pack_bits(kept), x[kept]

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        out.detach().zero_().masked_scatter_(unpack_bits(bitmap, out.numel()), values.detach())

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`."""
        return dense.detach()[unpack_bits(bitmap, dense.numel())]

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        check_float(x.dtype)
        x, out = x.detach(), out.detach()
        low, high = nearest(low, x.dtype), nearest(high, x.dtype)
        stopped = torch.zeros_like(x, dtype=torch.bool)
        if low != -math.inf:
            stopped |= x <= low
        if high != math.inf:
            stopped |= x >= high
        bits = pack_bits(~stopped)
        torch.clamp(x, low, high, out=out)
        return bits

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        grad = grad.detach()
        passes = unpack_bits(bitmap, grad.numel())
        # zeros, not grad * 0: infinity times zero would be NaN
        off = grad * scale_off if scale_off else torch.zeros((), dtype=grad.dtype, device=grad.device)
        out.detach().copy_(torch.where(passes, grad, off))
