"""`PackedTensor`: the large elements of a tensor, and one bit per element that says where they were."""

import dataclasses

import torch
from torch import Tensor

from fedmef_fx.packing.backends import backend_for, meta_backend
from fedmef_fx.packing.bitmap import bitmap_nbytes, count_bits
from fedmef_fx.packing.block_code import BlockCode
from fedmef_fx.packing.blockwise import BlockwiseTensor
from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.marked_elements import marked_grain, unpack_marked
from fedmef_fx.packing.registry import announce

__all__ = ["PackedTensor"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedTensor:
    """A tensor of which only the elements above a magnitude threshold are kept; the others read as 0.

    Bytes: ceil(n / 8) + kept * itemsize. At 10 % kept in float32 that is 0.525 bytes per element against 4; pairs of
    a value and an int32 index would take 0.8, and at 50 % kept as much as the dense tensor.

    Attributes:
        bitmap: uint8 `[ceil(n / 8)]`, in the order of memory of the packed tensor.
        values: `[kept]`, the kept elements bit for bit, or in a code.
        layout: Shape and memory order to restore, channels last included.
        dense_dtype: Dtype to restore; None for that of the values.

    Example:
        >>> packed = PackedTensor.pack(torch.tensor([[0.1, -3.0], [2.0, 0.0]]), threshold=1.0)
        >>> packed.unpack().tolist(), packed.values.tolist(), packed.nbytes
        ([[0.0, -3.0], [2.0, 0.0]], [-3.0, 2.0], 9)
    """

    bitmap: Tensor
    values: Tensor | BlockwiseTensor
    layout: MemoryLayout
    dense_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        announce(self.bitmap, "bitmap")
        if isinstance(self.values, Tensor):
            announce(self.values, "packed values")

    @classmethod
    def pack(cls, x: Tensor, *, threshold: float = 0.0) -> "PackedTensor":
        """Keep the elements of `x` with a magnitude strictly above the threshold, and NaN.

        Args:
            x: Any shape and strides; float16, bfloat16, float32 or float64. Not copied if dense in any memory order.
            threshold: >= 0. 0 keeps all that is not zero, so that `unpack` gives `x` back (-0.0 as 0.0).

        Raises:
            ConfigError: A negative threshold or NaN, or another dtype.
        """
        layout = MemoryLayout.of(x)
        bitmap, values = backend_for(x).pack(layout.flatten(x), threshold)
        return cls(bitmap, values, layout)

    @classmethod
    def predicted(cls, x: Tensor, *, kept: float) -> "PackedTensor":
        """What `pack` would give if it kept a share of `x`: the buffers of that size, without values.

        Args:
            x: A tensor without values (meta or fake), of any shape and strides.
            kept: Share of the elements that are stored, 0-1.
        """
        layout = MemoryLayout.of(x)
        bitmap, values = meta_backend().keep(layout.flatten(x), round(kept * layout.numel))
        return cls(bitmap, values, layout)

    def unpack(self) -> Tensor:
        """The dense tensor, in the shape, dtype, device and memory order of the packed one."""
        return self.unpack_part(0, self.layout.numel).as_strided(self.layout.shape, self.layout.stride)

    def unpack_part(self, start: int, stop: int) -> Tensor:
        """See `KeptTensor.unpack_part`."""
        flat = self.bitmap.new_empty(stop - start, dtype=self.dtype)
        if isinstance(self.values, Tensor):
            part, values = self.bitmap[start // 8 : bitmap_nbytes(stop)], self.values
            if stop - start < self.layout.numel and not has_no_values(part):
                before = count_bits(self.bitmap[: start // 8].numpy())
                values = values[before : before + count_bits(part.numpy())]
            backend_for(flat).unpack(part, values.to(self.dtype), out=flat)
        else:
            unpack_marked(self.values, self.bitmap, flat, numel=self.layout.numel, start=start)
        return flat

    @property
    def part_grain(self) -> int:
        """See `KeptTensor.part_grain`; on the CPU, where counting bits makes nobody wait."""
        if not isinstance(self.values, Tensor):
            return marked_grain(self.values)
        return 8 if self.bitmap.device.type == "cpu" else 0

    def narrowed(self, dtype: torch.dtype) -> "PackedTensor":
        """The same with values of 16 bits, rounded; `unpack` restores the dtype of the packed tensor.

        A finite value that the format cannot hold becomes its largest finite one of that sign. Infinities and NaN stay.

        Args:
            dtype: torch.bfloat16 or torch.float16; nothing changes where the values take no more already.
        """
        if not isinstance(self.values, Tensor) or self.values.dtype.itemsize <= dtype.itemsize:
            return self
        limit = torch.finfo(dtype).max
        clamped = self.values.clamp(-limit, limit).to(dtype)
        values = torch.where(self.values.isinf(), self.values.to(dtype), clamped)
        return PackedTensor(self.bitmap, values, self.layout, self.dtype)

    def coded(self, code: BlockCode, *, key: int | None = None) -> "PackedTensor":
        """The same with values in a code of few bits.

        Args:
            code: How.
            key: Of the noise of stochastic rounding; None draws one.
        """
        if not isinstance(self.values, Tensor):
            return self
        values = BlockwiseTensor.encode(self.values, code, key=key)
        return PackedTensor(self.bitmap, values, self.layout, self.dense_dtype)

    @property
    def count(self) -> int:
        """Number of elements that are stored."""
        return self.values.shape.numel()

    @property
    def shape(self) -> torch.Size:
        """Shape of the packed tensor."""
        return torch.Size(self.layout.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the packed tensor."""
        return self.dense_dtype or self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the packed tensor."""
        return self.values.device

    @property
    def kept(self) -> float:
        """Share of elements that are stored, 0-1; 0 for an empty tensor."""
        return self.count / max(self.layout.numel, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of the bitmap and the values."""
        return self.bitmap.nbytes + self.values.nbytes

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"PackedTensor({dtype}{list(self.shape)}, kept={self.kept:.3f}, {self.nbytes} bytes)"
