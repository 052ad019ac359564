"""`GradientBits`: what a clamp (ReLU, ReLU6, hardtanh) remembers for its backward pass, at one bit per element."""

import dataclasses
import math

import torch
from torch import Tensor

from fedmef_fx.packing.backends import backend_for
from fedmef_fx.packing.bitmap import pack_bits
from fedmef_fx.packing.layout import MemoryLayout
from fedmef_fx.packing.registry import announce

__all__ = ["GradientBits", "clamp"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GradientBits:
    """Where a gradient passes an elementwise nonlinearity.

    Attributes:
        bitmap: uint8 `[ceil(n / 8)]`, in the memory order of the input.
        layout: Shape and memory order of the input.
    """

    bitmap: Tensor
    layout: MemoryLayout

    def __post_init__(self) -> None:
        announce(self.bitmap, "bitmap")

    @classmethod
    def of(cls, passes: Tensor) -> "GradientBits":
        """From booleans `[*shape]`, e.g. `x > 0` of a leaky ReLU or the mask of a dropout."""
        layout = MemoryLayout.of(passes)
        return cls(pack_bits(layout.flatten(passes)), layout)

    def apply(self, grad: Tensor, *, scale_off: float = 0.0, inplace: bool = False) -> Tensor:
        """`grad` where the bit is set, else `grad * scale_off`.

        Args:
            grad: `[*shape]`, in any memory order.
            scale_off: Slope on the other side.
            inplace: Overwrite `grad` where its memory order is that of the input; the caller must own it.
        """
        flat = self.layout.flatten(grad)
        # Where flatten had to reorder, its copy is free to be overwritten anyway.
        reuse = inplace or not self.layout.describes(grad)
        out = flat if reuse else torch.empty_like(flat)
        backend_for(flat).mask_by_bits(self.bitmap, flat, out=out, scale_off=scale_off)
        return out.as_strided(self.layout.shape, self.layout.stride)

    @property
    def nbytes(self) -> int:
        """Bytes of the bitmap."""
        return self.bitmap.nbytes


def clamp(x: Tensor, *, low: float = 0.0, high: float = math.inf, inplace: bool = False) -> tuple[Tensor, GradientBits]:
    """`clamp(x, low, high)` and where gradients pass, in one pass over memory.

    Args:
        x: `[*shape]`, any strides.
        low: Lower bound; 0 for ReLU.
        high: Upper bound; inf for none.
        inplace: Overwrite `x` if it is dense; the caller must own it.

    Returns:
        The clamped tensor, detached, and the bits: `low < x < high`. As in torch NaN passes.
    """
    layout = MemoryLayout.of(x)
    flat = layout.flatten(x)
    # Where flatten had to reorder, its copy is free to be overwritten anyway.
    out = flat if inplace or not layout.describes(x) else torch.empty_like(flat)
    bits = backend_for(flat).clamp_bits(flat, out=out, low=low, high=high)
    return out.as_strided(layout.shape, layout.stride), GradientBits(bits, layout)
