"""A whole tensor, encoded: positions and values of its chunks, and the scales of its slices."""

import dataclasses
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmef_fx.export.onnx.codecs.exponents import (
    ExponentCode,
    SplitFloats,
    choose_exponents,
    join_floats,
    split_floats,
)
from fedmef_fx.export.onnx.codecs.positions import (
    PositionCode,
    Positions,
    choose_code,
    decode_positions,
    encode_positions,
)
from fedmef_fx.export.onnx.codecs.values import ValueCode, encode_values, itemsize

__all__ = ["CHUNK_ELEMENTS", "Chunk", "EncodedTensor", "decode_tensor", "encode_tensor"]

# Chunks share one tensor of zeros to write to, stay in the processor's caches, and have positions of 32 bits. Joining
# them is one more copy of the tensor, so the layers of common networks are one chunk each.
CHUNK_ELEMENTS: Final = 1 << 22
_WORTH_IT: Final = 0.98  # of the dense bytes: less is not worth a decoder
_NODE_BYTES: Final = 500  # of a chunk's decoder in the file
# Of all bytes: what Rice codes have to save, as decoding them takes half as long and half as much memory again as
# decoding fields; and beside values whose exponents are coded, which take memory of their own.
_RICE_PAYS: Final = 0.01
_RICE_PAYS_BESIDE_SPLIT: Final = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A run of elements of the flat tensor.

    Attributes:
        size: Elements.
        positions: Of the active ones; None where every element is stored.
        stored: `[active]`, their values, encoded.
    """

    size: int
    positions: Positions | None
    stored: NDArray[Any] | SplitFloats


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedTensor:
    """An encoded tensor.

    Attributes:
        shape: Of the tensor.
        dtype: Of the decoded tensor: float32 or int8.
        values: How values are stored.
        position_code: How positions are; None where every element is stored.
        chunks: In order.
        scale: `f32[shape[0]]` for int16 values; None for the others.
        exponents: How those of float32 values are; None where they are stored as they are.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: ValueCode
    position_code: PositionCode | None
    chunks: tuple[Chunk, ...]
    scale: NDArray[np.float32] | None
    exponents: ExponentCode | None = None

    @property
    def codec(self) -> str:
        """As in the manifest."""
        values = self.values if self.exponents is None else f"{self.values}-{self.exponents.name}"
        return f"{self.position_code.name if self.position_code else 'dense'}/{values}"

    @property
    def active(self) -> int:
        """Elements whose value is stored."""
        return sum(chunk.stored.size for chunk in self.chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of positions, values and scales."""
        streams = sum(chunk.stored.nbytes + (chunk.positions.nbytes if chunk.positions else 0) for chunk in self.chunks)
        return streams + (0 if self.scale is None else self.scale.nbytes)


def encode_tensor(
    tensor: NDArray[Any], values: ValueCode, *, splits: bool = True, chunk_elements: int = CHUNK_ELEMENTS
) -> EncodedTensor | None:
    """Encode a tensor in the way that takes the fewest bytes.

    Args:
        tensor: float32 or int8, of at least one dimension.
        values: How to store values; int8 for int8 tensors, and for no others.
        splits: Whether exponents of float32 values may be coded.
        chunk_elements: Elements of a chunk, at most 2**31 - 1.

    Returns:
        The encoded tensor; None where no encoding is worth its decoder, or a value is too large for float16.
    """
    flat = tensor.reshape(-1)
    positions = np.flatnonzero(flat)
    gaps = np.diff(positions, append=flat.size) - 1
    value_bytes = positions.size * itemsize(values)
    exponents = None
    if splits and values == "float32":
        candidate, split_bytes = choose_exponents(flat[positions])
        if split_bytes < value_bytes:
            exponents, value_bytes = candidate, split_bytes
    rice_pays = _RICE_PAYS if exponents is None else _RICE_PAYS_BESIDE_SPLIT
    code, position_bytes = choose_code(gaps, flat.size, value_bytes=value_bytes, rice_pays=rice_pays)
    overhead = _NODE_BYTES * math.ceil(flat.size / chunk_elements)
    scales = 4 * tensor.shape[0] if values == "int16" else 0
    sparse_bytes = position_bytes + value_bytes + scales + overhead
    full_bytes = flat.size * itemsize(values) + scales + (_NODE_BYTES if itemsize(values) < flat.itemsize else 0)
    if min(sparse_bytes, full_bytes) >= _WORTH_IT * flat.nbytes:
        return None
    is_sparse = sparse_bytes < _WORTH_IT * full_bytes
    if not is_sparse:
        positions = np.arange(flat.size)
    encoded = encode_values(flat[positions], positions // (flat.size // tensor.shape[0]), tensor.shape[0], code=values)
    if encoded is None:
        return None
    chunks: tuple[Chunk, ...] = (Chunk(flat.size, None, encoded.stored),)
    if is_sparse:
        starts = range(0, flat.size, chunk_elements)
        bounds = np.searchsorted(positions, [*starts, flat.size])
        chunks = tuple(
            Chunk(
                size := min(chunk_elements, flat.size - start),
                encode_positions(positions[low:high] - start, size, code),
                _split(encoded.stored[low:high], exponents),
            )
            for start, low, high in zip(starts, bounds[:-1], bounds[1:], strict=True)
        )
    if not is_sparse:
        return EncodedTensor(tensor.shape, tensor.dtype, values, None, chunks, encoded.scale)
    return EncodedTensor(tensor.shape, tensor.dtype, values, code, chunks, encoded.scale, exponents)


def decode_tensor(encoded: EncodedTensor) -> NDArray[Any]:
    """The tensor: bit-equal to the encoded one for float32 and int8 values, and to what the ONNX decoder computes."""
    flat = []
    for chunk in encoded.chunks:
        values = join_floats(chunk.stored) if isinstance(chunk.stored, SplitFloats) else chunk.stored
        if chunk.positions is None:
            flat.append(values.astype(encoded.dtype))
            continue
        decoded = np.zeros(chunk.size, encoded.dtype)
        decoded[decode_positions(chunk.positions)] = values
        flat.append(decoded)
    tensor = np.concatenate(flat).reshape(encoded.shape)
    if encoded.scale is None:
        return tensor
    return np.asarray(tensor * encoded.scale.reshape(-1, *[1] * (tensor.ndim - 1)), encoded.dtype)


def _split(stored: NDArray[Any], exponents: ExponentCode | None) -> NDArray[Any] | SplitFloats:
    return stored if exponents is None or not stored.size else split_floats(stored, exponents)
