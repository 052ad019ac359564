"""Save and load a transformed model without pickle: active weights, bitmaps, and everything else of its state.

The file is a safetensors file. Of a masked parameter it holds `active/<name>`, the active values in order, and
`mask/<name>`, the mask at one bit per weight, deflated; of any other parameter or buffer `state/<name>`. Tied tensors
are stored once. Its metadata has the format version, the configuration, the architecture (name, type and shape of each
tensor of the model, and which are tied) and a digest of all of it, so that damage is found before anything is used.

Loading validates everything first and copies then: a model is never half loaded.
"""

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedmef_fx.atomic import check_target, replacing
from fedmef_fx.config import Config
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.memory import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.model import (
    bitmap_name,
    is_transformed,
    mask_name,
    masked_parameters,
    set_masks,
    transformation_of,
)
from fedmef_fx.sparsity.optimizer_state import trust_loaded_state

__all__ = ["StoredTensor", "load", "read_tensors", "save"]

_FORMAT: Final = "fedmef_fx checkpoint"
_VERSION: Final = 1
_FUNCTION_FIELDS: Final = ("normalization", "nsconv_statistics", "residual")
"""Fields of `Config` that change what a model computes from the same tensors."""
_DESCRIBED: Final = re.compile(r"\w{1,20}\[((?:\d{1,15}(?:, )?){0,16})\]")
_MOST_ELEMENTS: Final = 2**30  # of one tensor: what a hostile file may claim costs at most so many bytes


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights, masks and buffers of a transformed model.

    Optimizer state, the mode and gradients are not part of it. The file is written whole or not at all.

    Args:
        model: A transformed model.
        path: The file to write.

    Raises:
        ConfigError: `model` was not made by `fedmef_fx.transform`.
        CheckpointError: A path that cannot be written, or state that is not a tensor.

    Example:
        >>> import tempfile, fedmef_fx
        >>> def net():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> sparse = fedmef_fx.transform(net(), fedmef_fx.Config(density=0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(sparse, f"{folder}/model.safetensors")
        ...     restored = load(f"{folder}/model.safetensors", net())
        >>> torch.equal(restored.get_parameter("0.weight"), sparse.get_parameter("0.weight"))
        True
    """
    config = transformation_of(model).config
    target = check_target(path, error=_named_error("save"))
    state, ties = _state(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensors[f"state/{name}"] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    for name, entry in masked_parameters(model).items():
        first = ties.get(name, name)
        del tensors[f"state/{first}"]
        tensors[f"active/{first}"] = entry.values().cpu()
        tensors[f"mask/{first}"] = _deflate(entry.buffer.cpu() if entry.is_packed else pack_bits(entry.buffer.cpu()))
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "config": config.to_json(),
        "architecture": json.dumps(_architecture(state, _dense_shapes(model, ties))),
        "tied": json.dumps(ties),
    }
    metadata["digest"] = _digest(tensors, metadata)
    try:
        data = safetensors.torch.save(tensors, metadata)
    except (safetensors.SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"save: the model's state cannot be stored as safetensors: {error}") from error
    with replacing(target, error=_named_error("save")) as temporary:
        temporary.write_bytes(data)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Read what `save` wrote.

    Args:
        path: The file.
        model: Either a transformed model, which gets the stored weights, masks and buffers in place (as `set_masks`
            does it: optimizers that hold its parameters stay valid), or an original one, which is transformed with the
            stored configuration first and does not change.
        example_inputs: For that transformation, as in `fedmef_fx.transform`.
        example_kwargs: For that transformation.

    Returns:
        The transformed model.

    Raises:
        CheckpointError: No checkpoint, a damaged one, a newer format, or one of another architecture or configuration.
            The model is as it was.
    """
    tensors, metadata = _read(Path(path))
    config = _config(metadata)
    architecture, ties = _json(metadata, "architecture"), _json(metadata, "tied")
    if not is_transformed(model):
        from fedmef_fx.api import transform  # noqa: PLC0415 -- it imports the passes, which import the core

        original, _ = _state(model)
        known = {name: entry for name, entry in architecture.items() if name in original}
        _check_architecture(_architecture(original, {}), known)
        model = transform(model, config, example_inputs=example_inputs, example_kwargs=example_kwargs)
    state, own_ties = _state(model)
    _check_architecture(_architecture(state, _dense_shapes(model, own_ties)), architecture)
    if own_ties != ties:
        raise CheckpointError(f"load: tied parameters are {ties} in the checkpoint, {own_ties} in the model")
    _check_function(transformation_of(model).config, config)
    masks = _masks(tensors, model, own_ties)
    values = {name: _value(tensors, name, tensor, masks.get(name)) for name, tensor in state.items()}

    entries = masked_parameters(model)
    set_masks(model, {name: masks[own_ties.get(name, name)] for name in entries})
    for name, entry in entries.items():
        entry.write(values[own_ties.get(name, name)])
    with torch.no_grad():
        for name in state.keys() - masks.keys():
            state[name].copy_(values[name])
    trust_loaded_state(model.parameters())
    return model


def _named_error(call: str) -> Any:
    return lambda message: CheckpointError(f"{call}: {message}")


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's live tensors, each under its first name, and its other names: alias -> first name.

    Masks, bitmaps and non-persistent buffers are not part of it.
    """
    entries = masked_parameters(model) if is_transformed(model) else {}
    masks = {bitmap_name(name) if entry.is_packed else mask_name(name) for name, entry in entries.items()}
    state: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if name in masks:
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"save: {name} is a {type(value).__name__}; expected tensors only, as anything else needs pickle"
            )
        known = first.setdefault(id(value), name)
        if known == name:
            state[name] = value
        else:
            ties[name] = known
    return state, ties


def _architecture(state: Mapping[str, Tensor], dense: Mapping[str, torch.Size]) -> dict[str, str]:
    """Type and shape of each tensor, e.g. `float32[64, 3]`; of a packed weight the shape of the dense one."""
    described = {name: f"{tensor.dtype}{list(dense.get(name, tensor.shape))}" for name, tensor in state.items()}
    return {name: text.removeprefix("torch.") for name, text in described.items()}


def _dense_shapes(model: nn.Module, ties: Mapping[str, str]) -> dict[str, torch.Size]:
    """The dense shapes of masked weights, by first name."""
    return {ties.get(name, name): entry.shape for name, entry in masked_parameters(model).items()}


def _check_architecture(own: Mapping[str, str], stored: Mapping[str, str]) -> None:
    for name, entry in own.items():
        if name not in stored:
            raise CheckpointError(f"load: another architecture: the checkpoint has no {name}, which the model has")
        if stored[name] != entry:
            raise CheckpointError(
                f"load: another architecture: {name} is {stored[name]} in the checkpoint, {entry} in the model"
            )
    for name in stored:
        if name not in own:
            raise CheckpointError(f"load: another architecture: the checkpoint has {name}, which the model has not")


def _check_function(own: Config, stored: Config) -> None:
    for field in _FUNCTION_FIELDS:
        ours, theirs = getattr(own, field), getattr(stored, field)
        if ours != theirs:
            raise CheckpointError(
                f"load: the checkpoint was trained with {field}={theirs!r}, the model was transformed with {ours!r}; "
                "load into the original model, which is then transformed with the checkpoint's configuration"
            )


def _deflate(bitmap: Tensor) -> Tensor:
    return _bytes(zlib.compress(bitmap.numpy().tobytes()))


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _masks(tensors: Mapping[str, Tensor], model: nn.Module, ties: Mapping[str, str]) -> dict[str, Tensor]:
    """The stored masks by first name, checked against those that the model has."""
    own = _dense_shapes(model, ties)
    stored = {key.removeprefix("mask/") for key in tensors if key.startswith("mask/")}
    if own.keys() != stored:
        name = sorted(own.keys() ^ stored)[0]
        where = "the checkpoint" if name in stored else "the model"
        raise CheckpointError(
            f"load: {name} has a mask in {where} only; load into the original model, which is then transformed with "
            "the checkpoint's configuration"
        )
    return {name: _inflate(name, tensors[f"mask/{name}"], shape) for name, shape in own.items()}


def _inflate(name: str, packed: Tensor, shape: torch.Size) -> Tensor:
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


def _value(tensors: Mapping[str, Tensor], name: str, own: Tensor, mask: Tensor | None) -> Tensor:
    """A stored tensor; of a masked parameter its active values."""
    stored = tensors.get(f"state/{name}" if mask is None else f"active/{name}")
    shape = own.shape if mask is None else torch.Size([int(mask.sum())])
    if stored is None or stored.shape != shape or stored.dtype != own.dtype:
        got = "nothing" if stored is None else f"{stored.dtype}{list(stored.shape)}"
        raise CheckpointError(f"load: damaged: {name} holds {got}; expected {own.dtype}{list(shape)}")
    return stored


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file, whole and of a format that this version reads."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"load: {path} cannot be read: {error}") from error
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # of hostile headers: its own exceptions, and whatever torch says to sizes and types
        raise CheckpointError(
            f"load: {path} ({len(data):,} bytes) is not a checkpoint, or a truncated or damaged one: {error}"
        ) from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"load: {path} is not a checkpoint of fedmef_fx; expected a file that fedmef_fx.save wrote"
        )
    version = str(metadata.get("version"))
    if version.isdecimal() and int(version[:9]) > _VERSION:
        raise CheckpointError(
            f"load: {path} has format version {version}; this version of fedmef_fx reads up to {_VERSION}: upgrade it, "
            "e.g. pip install -U fedmef-fx"
        )
    if _digest(tensors, metadata) != metadata.get("digest"):
        raise CheckpointError(f"load: {path} is damaged: its content does not have the digest that it states")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all tensors with their names, types and shapes, and of the other metadata."""
    digest = hashlib.sha256()
    described = {key: value for key, value in metadata.items() if key != "digest"}
    digest.update(json.dumps([described, _architecture(tensors, {})], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config(metadata: Mapping[str, str]) -> Config:
    try:
        return Config.from_json(metadata["config"])
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"load: the checkpoint's configuration cannot be used: {error}") from error


def _json(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
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
    tensors, metadata = _read(Path(path))
    found = {}
    for name, described in _json(metadata, "architecture").items():
        shape = _stated_shape(name, described)
        packed, values = tensors.get(f"mask/{name}"), tensors.get(f"state/{name}")
        mask = None
        if packed is not None:
            mask, values = _inflate(name, packed, shape), tensors.get(f"active/{name}")
        expected = shape.numel() if mask is None else int(mask.sum())
        if values is None or values.numel() != expected:
            got = "nothing" if values is None else f"{values.numel()} values"
            raise CheckpointError(f"load: damaged: {name} holds {got}; expected {expected} values")
        found[name] = StoredTensor(values.reshape(-1), mask, shape)
    return found


def _stated_shape(name: str, described: object) -> torch.Size:
    """The shape in a text such as `float32[64, 3]`."""
    match = _DESCRIBED.fullmatch(described) if isinstance(described, str) else None
    if match is None:
        raise CheckpointError(f"load: damaged: {name} is described as {described!r:.80}; expected e.g. float32[64, 3]")
    sizes = [int(size) for size in match[1].split(",") if size.strip()]
    if math.prod(sizes) > _MOST_ELEMENTS:
        raise CheckpointError(f"load: {name} claims the shape {sizes}; expected at most {_MOST_ELEMENTS:,} elements")
    return torch.Size(sizes)
