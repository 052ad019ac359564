"""`RectifiedTensor`: the result of a ReLU, ReLU6 or leaky ReLU, of which the mask that it keeps anyway is used again.

The mask says where a gradient passes (`GradientBits`). With it

- of a ReLU's result only the elements where it is set are coded, one after another; the others read as 0;
- of one with an upper bound also the places that are at the bound are kept, whose gradient does not pass either: as
  positions of 4 bytes or, where they are many, at one bit per element;
- of a leaky ReLU's result with some slope the magnitudes before it are coded, of all elements: the mask is their sign.
"""

import dataclasses
import math

import torch
from torch import Tensor

from fedmef_fx.packing.backends import backend_for
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.blockwise import BlockwiseTensor
from fedmef_fx.packing.gradient_bits import GradientBits
from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.registry import announce

__all__ = ["RectifiedTensor"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class RectifiedTensor:
    """See the module docstring.

    Attributes:
        bits: The mask, which belongs to the ReLU.
        values: The coded elements.
        layout: Shape and memory order to restore.
        high: Upper bound of the ReLU; inf for none.
        slope: Its slope below 0.
        at_bound: int32 positions, or a uint8 bitmap, of the elements at the bound; None where there are none.

    Example:
        >>> from fedmef_fx.packing import clamp
        >>> out, bits = clamp(torch.tensor([-1.0, 2.0, 7.0, 4.0]), high=6.0)
        >>> kept = RectifiedTensor.encode(out, bits, BlockCode(bits=2), high=6.0)
        >>> kept.unpack().round().tolist()
        [0.0, 2.0, 6.0, 4.0]
    """

    bits: GradientBits
    values: BlockwiseTensor
    layout: MemoryLayout
    high: float = math.inf
    slope: float = 0.0
    at_bound: Tensor | None = None

    def __post_init__(self) -> None:
        if self.at_bound is not None:
            announce(self.at_bound, "bitmap" if self.at_bound.dtype == torch.uint8 else "packed values")

    @classmethod
    def encode(
        cls,
        x: Tensor,
        bits: GradientBits,
        code: BlockCode,
        *,
        high: float = math.inf,
        slope: float = 0.0,
        key: int | None = None,
        expected_kept: float = 1.0,
    ) -> "RectifiedTensor":
        """Encode the result of a ReLU, or a dense view of all of it.

        Args:
            x: In the memory order of `bits`, in whatever shape.
            bits: Where gradients pass.
            code: How.
            high: Upper bound of the ReLU.
            slope: Its slope below 0.
            key: Of the noise of stochastic rounding; None draws one.
            expected_kept: Share of elements that a tensor without values (meta or fake) is taken to code.
        """
        layout = MemoryLayout.of(x)
        flat = layout.flatten(x)
        at_bound = None
        if slope:
            values = torch.empty_like(flat)
            backend_for(flat).mask_by_bits(bits.bitmap, flat.abs(), out=values, scale_off=1 / slope)
        elif has_no_values(x):
            values = flat.new_empty(round(expected_kept * layout.numel))
        else:
            values = backend_for(flat).gather(bits.bitmap, flat)
            at_bound = None if high == math.inf else _places(flat == high)
        return cls(bits, BlockwiseTensor.encode(values, code, key=key), layout, high, slope, at_bound)

    def unpack(self) -> Tensor:
        """The decoded tensor, in the shape, dtype, device and memory order of the encoded one."""
        values = self.values.unpack()
        flat = values.new_empty(self.layout.numel)
        dense = flat.as_strided(self.layout.shape, self.layout.stride)
        if self.slope:
            backend_for(flat).mask_by_bits(self.bits.bitmap, values, out=flat, scale_off=-self.slope)
            return dense
        backend_for(flat).unpack(self.bits.bitmap, values, out=flat)
        if self.at_bound is not None and self.at_bound.dtype == torch.uint8:
            flat.masked_fill_(unpack_bits(self.at_bound, flat.numel()), self.high)
        elif self.at_bound is not None:
            flat.index_fill_(0, self.at_bound.long(), self.high)
        return dense

    @property
    def kept(self) -> float:
        """Share of elements that are coded, 0-1; 0 for an empty tensor."""
        return self.values.shape.numel() / max(self.layout.numel, 1)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept beside the mask."""
        return self.values.nbytes + (0 if self.at_bound is None else self.at_bound.nbytes)


def _places(marked: Tensor) -> Tensor | None:
    """Which elements are marked, in as few bytes as either form takes; None for none of them."""
    positions = marked.nonzero()[:, 0]
    if positions.numel() == 0:
        return None
    fits = marked.numel() < 2**31 and 4 * positions.numel() < bitmap_nbytes(marked.numel())
    return positions.to(torch.int32) if fits else pack_bits(marked)
