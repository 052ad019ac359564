"""The container of messages and checkpoints: safetensors bytes, written by the library and read strictly.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape and
offsets) and the data. What is specific to this project stands as JSON text in the metadata entry `fedmef`. Reading is
done here, because bytes from a peer must never end in anything but `WireError`: the reader allocates no more than the
bytes it was given, and takes only what the writer can have written.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError, WireError

__all__ = ["DTYPES", "STORED_DTYPES", "decode", "digest", "encode", "read"]

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that can be exchanged, by their safetensors names."""

STORED_DTYPES: Final[dict[str, torch.dtype]] = DTYPES | {
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""The dtypes that a model's state may have in a file, by their safetensors names."""

_KEY: Final = "fedmef"


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Tensors and metadata as safetensors bytes; the same content always gives the same bytes.

    Args:
        tensors: Name -> tensor of any shape, one of `DTYPES`.
        metadata: Anything JSON can hold, without NaN and infinities.

    Raises:
        ConfigError: A tensor of another dtype.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ConfigError(f"{name!r}: got {tensor.dtype}; expected one of {', '.join(map(str, DTYPES.values()))}")
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # One entry only: the library writes several in an order that differs from call to call.
    return safetensors.torch.save({name: _owned(tensor) for name, tensor in tensors.items()}, {_KEY: text})


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 of tensors and metadata, in hexadecimal; their order does not matter."""
    result = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype}{list(tensor.shape)}".encode())
        result.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def decode(data: bytes, *, header_bytes: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `encode` wrote.

    Args:
        data: The bytes.
        header_bytes: Length of the longest header that is parsed; None for any.

    Returns:
        The tensors, on the CPU and independent of `data`, and the metadata.

    Raises:
        WireError: Anything else than what `encode` writes; no other error, whatever the bytes.
    """
    header, start = _header(data, header_bytes)
    metadata = _metadata(header.pop("__metadata__", None))
    return _tensors(data, header, start, DTYPES), metadata


def read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file with metadata of its own kind, and with any of `STORED_DTYPES`.

    Returns:
        The tensors, on the CPU and independent of `data`, and the metadata; empty where there is none.

    Raises:
        WireError: Anything else than what the library writes; no other error, whatever the bytes.
    """
    header, start = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise WireError(f"container: got metadata {metadata!r:.80}; expected texts by name")
    return _tensors(data, header, start, STORED_DTYPES), metadata


def _tensors(
    data: bytes, header: Mapping[str, Any], start: int, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    entries = sorted(
        ((*_entry(name, entry, dtypes), name) for name, entry in header.items()), key=lambda entry: entry[0]
    )
    tensors, position = {}, start
    for (begin, end), dtype, shape, name in entries:
        if start + begin != position or start + end > len(data):
            raise WireError(
                f"container: {name!r}: got offsets {begin} to {end}; expected data without gaps or overlaps"
            )
        tensors[name] = _tensor(name, data[position : start + end], dtype, shape)
        position = start + end
    if position != len(data):
        raise WireError(f"container: got {len(data)} bytes; expected {position}, which is where the last tensor ends")
    return tensors


def _header(data: bytes, longest: int | None = None) -> tuple[dict[str, Any], int]:
    """The header and the offset of the first tensor."""
    if len(data) < 8:
        raise WireError(f"container: got {len(data)} bytes; expected at least 8, the length of the header")
    (length,) = struct.unpack_from("<Q", data)
    if length > len(data) - 8:
        raise WireError(f"container: got a header of {length} bytes in {len(data)} bytes: truncated, or another format")
    if longest is not None and length > longest:
        raise WireError(f"container: got a header of {length} bytes; expected at most {longest}: another model")
    header = _json(data[8 : 8 + length], "header")
    return header, 8 + length


def _json(text: bytes | str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"container: {what}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"container: {what}: got a JSON {type(value).__name__}; expected an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _metadata(entry: object) -> dict[str, Any]:
    text = entry.get(_KEY) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise WireError(f"container: got no metadata {_KEY!r}; expected a message or checkpoint of fedmef_fx.federated")
    return _json(text, "metadata")


def _entry(
    name: str, entry: object, dtypes: Mapping[str, torch.dtype]
) -> tuple[tuple[int, int], torch.dtype, tuple[int, ...]]:
    """Offsets, dtype and shape of one tensor of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"container: {name!r}: got {entry!r:.80}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise WireError(f"container: {name!r}: got dtype {dtype!r:.80}; expected one of {', '.join(dtypes)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise WireError(f"container: {name!r}: got shape {shape!r:.80}, offsets {offsets!r:.80}; expected sizes")
    if offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype].itemsize:
        raise WireError(f"container: {name!r}: got offsets {offsets} for {dtype}{shape}; expected the size of its data")
    return (offsets[0], offsets[1]), dtypes[dtype], tuple(shape)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**48 for size in value)


def _tensor(name: str, data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    try:
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if dtype == torch.bool and bool((flat.view(torch.uint8) > 1).any()):
            raise WireError(f"container: {name!r}: got bytes other than 0 and 1; expected booleans")
        return flat.reshape(shape)
    except RuntimeError as error:  # the strides of an empty tensor with huge dimensions overflow
        raise WireError(f"container: {name!r}: got shape {shape}: {error}") from error
