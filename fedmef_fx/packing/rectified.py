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
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.blockwise import BlockwiseTensor
from fedmef_fx.packing.gradient_bits import GradientBits
from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.marked_elements import (
    encode_marked,
    fill_places,
    marked_grain,
    places_of,
    places_within,
    unpack_marked,
)
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
            magnitudes = flat.abs()
            backend_for(flat).mask_by_bits(bits.bitmap, magnitudes, out=magnitudes, scale_off=1 / slope)
            values = BlockwiseTensor.encode(magnitudes, code, key=key)
        else:
            expected = round(expected_kept * layout.numel)
            values = encode_marked(flat, bits.bitmap, code, key=key, expected_count=expected)
            at_bound = None if high == math.inf or has_no_values(x) else places_of(high, flat)
        return cls(bits, values, layout, high, slope, at_bound)

    def unpack(self) -> Tensor:
        """The decoded tensor, in the shape, dtype, device and memory order of the encoded one."""
        if self.slope:
            flat = self.values.unpack()
            backend_for(flat).mask_by_bits(self.bits.bitmap, flat, out=flat, scale_off=-self.slope)
            return flat.as_strided(self.layout.shape, self.layout.stride)
        return self.unpack_part(0, self.layout.numel).as_strided(self.layout.shape, self.layout.stride)

    def unpack_part(self, start: int, stop: int) -> Tensor:
        """See `KeptTensor.unpack_part`; of what has no slope."""
        flat = self.values.codes.new_empty(stop - start, dtype=self.values.dtype)
        unpack_marked(self.values, self.bits.bitmap, flat, numel=self.layout.numel, start=start)
        if self.at_bound is not None:
            fill_places(places_within(self.at_bound, start, stop), self.high, flat)
        return flat

    @property
    def part_grain(self) -> int:
        """See `KeptTensor.part_grain`."""
        return 0 if self.slope else marked_grain(self.values)

    @property
    def kept(self) -> float:
        """Share of elements that are coded, 0-1; 0 for an empty tensor."""
        return self.values.shape.numel() / max(self.layout.numel, 1)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept beside the mask."""
        return self.values.nbytes + (0 if self.at_bound is None else self.at_bound.nbytes)
