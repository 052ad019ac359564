"""Where the two sides of a comparison come from: a model, a checkpoint, or a round of a federated run."""

import json
import os
from pathlib import Path
from typing import Final, TypeAlias

from torch import Tensor, nn

from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.files.checkpoint_file import StoredTensor, read_tensors
from fedmef_fx.sparse_model.mask_digest import DIGEST
from fedmef_fx.sparse_model.masks import bitmap_name, mask_name
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.thresholds import THRESHOLDS
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["Source", "stored_tensors"]

Source: TypeAlias = nn.Module | str | os.PathLike[str]

_LONGEST_HEADER_BYTES: Final = 100_000_000  # as safetensors itself has it


def stored_tensors(source: Source) -> dict[str, StoredTensor]:
    """The floating point tensors of a state, by name; those with masks as their active values.

    Args:
        source: A model; a file that `fedmef_fx.save` wrote; or a checkpoint of a federated run, or its directory,
            which stands for the newest round.

    Raises:
        ConfigError: Neither a model nor a path.
        CheckpointError: A file that is missing, damaged or something else.
    """
    if isinstance(source, nn.Module):
        return _floating(_of_model(source))
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"compare: got {type(source).__name__}; expected a model or the path of a checkpoint")
    path = Path(source)
    if path.is_dir():
        path = _newest(path)
    return _floating(_of_round(path) if _is_of_federation(path) else read_tensors(path))


def _floating(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: stored for name, stored in tensors.items() if stored.values.is_floating_point()}


def _of_model(model: nn.Module) -> dict[str, StoredTensor]:
    masked = masked_parameters(model) if is_transformed(model) else {}
    left_out = {bitmap_name(name) if parameter.is_packed else mask_name(name) for name, parameter in masked.items()}
    left_out |= {DIGEST, THRESHOLDS}
    stored: dict[str, StoredTensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in left_out or not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if name in masked:
            mask = masked[name].mask.cpu()
            stored[name] = StoredTensor(masked[name].values().detach().cpu(), mask, mask.shape)
        else:
            stored[name] = StoredTensor(tensor.detach().cpu().reshape(-1), None, tensor.shape)
    return stored


def _newest(directory: Path) -> Path:
    from fedmef_fx.federated.checkpoint import FILE_NAME  # noqa: PLC0415 -- the federation takes long to import

    for path in (directory / FILE_NAME, directory / "rounds" / FILE_NAME):
        if path.is_file():
            return path
    raise CheckpointError(f"{directory}: has no {FILE_NAME}; expected the checkpoint_dir of a federated run, or a file")


def _of_round(path: Path) -> dict[str, StoredTensor]:
    from fedmef_fx.federated.checkpoint import read_state_file  # noqa: PLC0415 -- as above

    state = read_state_file(path)
    stored = {name: StoredTensor(state.values[name], mask, mask.shape) for name, mask in state.masks.items()}
    return stored | {name: StoredTensor(t.reshape(-1), None, t.shape) for name, t in state.dense.items()}


def _is_of_federation(path: Path) -> bool:
    """Whether the header of a safetensors file says that a federation wrote it; damage is found by its reader."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER_BYTES)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError):
        return False
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(metadata, dict) and "fedmef" in metadata
