"""What each way of keeping a tensor costs, in bytes, and which ways cost more than keeping it unchanged.

| codec     | keeps                                   | bytes of n elements              |
|-----------|-----------------------------------------|----------------------------------|
| exact     | the tensor                              | n * itemsize                     |
| packed    | values above a threshold, and a bitmap  | n / 8 + kept * n * value itemsize |
| blockwise | 1 to 8 bits per element, in blocks      | n * bits / 8 + 4 * n / block; 8 bits: n + 8 * n / 256 |
| bits      | 1 bit per element                       | n / 8                            |
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from fedmef_fx.errors import FedmefError
from fedmef_fx.packing.bitmap import bitmap_nbytes
from fedmef_fx.packing.block_code import EIGHT_BITS, BlockCode
from fedmef_fx.packing.layout import MemoryLayout

__all__ = ["Codec", "KeptTensor", "KeptWhole", "codec_nbytes", "why_dense"]

Codec = Literal["exact", "packed", "blockwise", "bits"]


class KeptTensor(Protocol):
    """A tensor in the form that is kept for backward."""

    def unpack(self) -> Tensor:
        """The dense tensor, in the shape, dtype, device and memory order of the kept one."""

    def unpack_part(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in the order of memory, flat; only from multiples of `part_grain` on."""

    @property
    def part_grain(self) -> int:
        """At whose multiples parts may begin that are decoded by themselves; 0 where only the whole can be."""

    @property
    def layout(self) -> MemoryLayout | None:
        """Shape and memory order of the kept tensor; None where it is not known."""

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for this tensor alone."""


class KeptWhole:
    """Base of kept tensors of which no part can be decoded by itself."""

    __slots__ = ()

    @property
    def part_grain(self) -> int:
        """See `KeptTensor.part_grain`."""
        return 0

    @property
    def layout(self) -> MemoryLayout | None:
        """See `KeptTensor.layout`."""
        return None

    def unpack_part(self, start: int, stop: int) -> Tensor:
        """See `KeptTensor.unpack_part`.

        Raises:
            FedmefError: Always.
        """
        raise FedmefError(f"{type(self).__name__}: got a part, [{start}, {stop}); expected the whole: call unpack()")


def codec_nbytes(
    codec: Codec,
    numel: int,
    dtype: torch.dtype,
    *,
    kept: float = 1.0,
    value_dtype: torch.dtype | None = None,
    code: BlockCode | None = None,
) -> int:
    """Bytes that a codec takes.

    Args:
        codec: The codec.
        numel: Number of elements of the tensor.
        dtype: Of the tensor.
        kept: Share of elements that "packed" stores, 0-1.
        value_dtype: In which "packed" stores them; None for the tensor's own.
        code: Of "blockwise", 8 bits if None; in which "packed" stores them instead.

    Example:
        >>> [codec_nbytes(codec, 1024, torch.float32, kept=0.1) for codec in ("exact", "packed", "blockwise", "bits")]
        [4096, 536, 1056, 128]
    """
    if codec == "exact":
        return numel * dtype.itemsize
    if codec == "packed":
        count = round(kept * numel)
        values = count * (value_dtype or dtype).itemsize if code is None else code.nbytes(count, dtype)
        return bitmap_nbytes(numel) + values
    return bitmap_nbytes(numel) if codec == "bits" else (code or EIGHT_BITS).nbytes(numel, dtype)


def why_dense(nbytes: int, numel: int, dtype: torch.dtype) -> str:
    """Why a tensor is better kept unchanged than in some bytes; empty otherwise."""
    exact = codec_nbytes("exact", numel, dtype)
    return f"keeps dense: {nbytes} bytes against {exact}" if nbytes >= exact else ""
