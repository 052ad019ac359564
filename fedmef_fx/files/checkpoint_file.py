"""The file of a checkpoint: what `checkpoint.save` wrote, read without a model and checked before anything is used.

The digest in its metadata covers all tensors and all other metadata; sizes that a file claims are bounded, so that a
small hostile one cannot take all memory.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmef_fx.errors import CheckpointError, WireError
from fedmef_fx.files.container import read
from fedmef_fx.packing import bitmap_nbytes, unpack_bits

__all__ = [
    "FORMAT",
    "VERSION",
    "StoredTensor",
    "deflate",
    "described",
    "digest_of",
    "inflate",
    "parsed",
    "read_file",
    "read_tensors",
]

FORMAT: Final = "fedmef_fx checkpoint"
VERSION: Final = 1
_DESCRIBED: Final = re.compile(r"\w{1,20}\[((?:\d{1,15}(?:, )?){0,16})\]")
_MOST_ELEMENTS: Final = 2**30  # of one tensor: what a hostile file may claim costs at most so many bytes


def deflate(bitmap: Tensor) -> Tensor:
    """A bitmap, uint8 `[bytes]`, as a file stores it."""
    return _bytes(zlib.compress(bitmap.numpy().tobytes()))


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def inflate(name: str, packed: Tensor, shape: torch.Size) -> Tensor:
    """The mask of a stored bitmap: boolean, of the weight's shape.

    Raises:
        CheckpointError: It is damaged, or of another number of weights.
    """
    expected = bitmap_nbytes(shape.numel())
    inflater = zlib.decompressobj()
    try:
        # Bounded, so that a small file cannot claim all memory.
        data = inflater.decompress(packed.numpy().tobytes(), expected + 1)
    except zlib.error as error:
        raise CheckpointError(f"load: the mask of {name} is damaged: {error}") from error
    if packed.dtype != torch.uint8 or len(data) != expected or not inflater.eof:
        raise CheckpointError(f"load: the mask of {name} does not have the {expected} bytes of {shape.numel()} weights")
    return unpack_bits(_bytes(data), shape.numel()).reshape(shape)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file, whole and of a format that this version reads.

    Raises:
        CheckpointError: A file that cannot be read, no checkpoint, a damaged one, or one of a newer version.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"load: {path} cannot be read: {error}") from error
    try:
        tensors, metadata = read(data)
    except WireError as error:
        raise CheckpointError(
            f"load: {path} ({len(data):,} bytes) is not a checkpoint, or a truncated or damaged one: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"load: {path} is not a checkpoint of fedmef_fx; expected a file that fedmef_fx.save wrote"
        )
    version = str(metadata.get("version"))
    if version.isdecimal() and int(version[:9]) > VERSION:
        raise CheckpointError(
            f"load: {path} has format version {version}; this version of fedmef_fx reads up to {VERSION}: upgrade it, "
            "e.g. pip install -U fedmef-fx"
        )
    if digest_of(tensors, metadata) != metadata.get("digest"):
        raise CheckpointError(f"load: {path} is damaged: its content does not have the digest that it states")
    return tensors, metadata


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all tensors with their names, types and shapes, and of the other metadata."""
    digest = hashlib.sha256()
    stated = {key: value for key, value in metadata.items() if key != "digest"}
    architecture = {name: described(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    digest.update(json.dumps([stated, architecture], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parsed(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """An entry of the metadata that is a JSON object.

    Raises:
        CheckpointError: It is missing, or no object.
    """
    try:
        value = json.loads(metadata[key])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"load: the checkpoint's {key} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"load: the checkpoint's {key} is a {type(value).__name__}; expected an object")
    return value


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        values: `[active]`, the active values in row-major order; all values where there is no mask.
        mask: Boolean, of the tensor's shape; None where it has none.
        shape: Its shape.
    """

    values: Tensor
    mask: Tensor | None
    shape: torch.Size


def read_tensors(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The tensors of a file that `save` wrote, without a model to load them into; tied ones under their first name.

    Raises:
        CheckpointError: No checkpoint, or a damaged one.
    """
    tensors, metadata = read_file(Path(path))
    arrays = {}
    for name, text in parsed(metadata, "architecture").items():
        shape = _stated_shape(name, text)
        packed, values = tensors.get(f"mask/{name}"), tensors.get(f"state/{name}")
        mask = None
        if packed is not None:
            mask, values = inflate(name, packed, shape), tensors.get(f"active/{name}")
        expected = shape.numel() if mask is None else int(mask.count_nonzero())
        if values is None or values.numel() != expected:
            got = "nothing" if values is None else f"{values.numel()} values"
            raise CheckpointError(f"load: damaged: {name} holds {got}; expected {expected} values")
        arrays[name] = StoredTensor(values.reshape(-1), mask, shape)
    return arrays


def described(dtype: torch.dtype, shape: torch.Size) -> str:
    """Type and shape of a tensor as text, e.g. `float32[64, 3]`."""
    return f"{dtype}{list(shape)}".removeprefix("torch.")


def _stated_shape(name: str, text: object) -> torch.Size:
    """The shape in a text such as `float32[64, 3]`."""
    match = _DESCRIBED.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise CheckpointError(f"load: damaged: {name} is described as {text!r:.80}; expected e.g. float32[64, 3]")
    sizes = [int(size) for size in match[1].split(",") if size.strip()]
    if math.prod(sizes) > _MOST_ELEMENTS:
        raise CheckpointError(f"load: {name} claims the shape {sizes}; expected at most {_MOST_ELEMENTS:,} elements")
    return torch.Size(sizes)
