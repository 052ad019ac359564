"""The checkpoint of a federated run: one safetensors file, replaced as a whole after every finished round.

It holds all that the next round depends on: the server's masks (one bit per weight), active values and dense tensors,
what each client is known to have, the history, and the settings of the run. Random numbers need no place: they derive
from seed, round and client. A SHA-256 digest tells a damaged file from a sound one.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fedmef_fx.errors import CheckpointError, WireError
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.state import ModelState, Schema, TensorSpec
from fedmef_fx.files.atomic import replacing
from fedmef_fx.files.container import decode, digest, encode
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits

__all__ = [
    "FILE_NAME",
    "Checkpoint",
    "clear_leftovers",
    "load_checkpoint",
    "read_state_file",
    "round_file_name",
    "save_checkpoint",
]

FILE_NAME: Final = "federation.safetensors"

_FORMAT: Final = 1
_MEMORY: Final = "memory/"
_CLIENT: Final = "client/"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Where a run stands after a finished round.

    Attributes:
        state: The server's model.
        changed: As in `Server`.
        known: As in `Server`.
        rounds: The history so far.
        settings: What the run was started with, as JSON can hold it.
        memory: As in `Server`.
        failures: Clients that were left out so far.
        clients: What the strategy keeps of each client: number -> tensors by name.
    """

    state: ModelState
    changed: Mapping[str, int]
    known: Mapping[int, int]
    rounds: tuple[RoundRecord, ...]
    settings: Mapping[str, Any]
    memory: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    clients: Mapping[int, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, name: str = FILE_NAME) -> None:
    """Write a checkpoint over the earlier one.

    Args:
        directory: Where; it exists.
        checkpoint: What.
        name: Of the file.

    Raises:
        CheckpointError: The file cannot be written.
    """
    state = checkpoint.state
    tensors = {f"value/{name}": values for name, values in state.values.items()}
    tensors |= {f"mask/{name}": pack_bits(mask) for name, mask in state.masks.items()}
    tensors |= {f"dense/{name}": tensor for name, tensor in state.dense.items()}
    tensors |= {f"{_MEMORY}{name}": tensor for name, tensor in checkpoint.memory.items()}
    for client, kept in checkpoint.clients.items():
        tensors |= {f"{_CLIENT}{client}/{name}": tensor for name, tensor in kept.items()}
    fields = {
        "run": state.run,
        "version": state.version,
        "changed": dict(checkpoint.changed),
        "known": {str(client): version for client, version in checkpoint.known.items()},
        "rounds": [record.to_dict() for record in checkpoint.rounds],
        "failures": [list(failure) for failure in checkpoint.failures],
        "settings": dict(checkpoint.settings),
        "shapes": {name: list(mask.shape) for name, mask in state.masks.items()},
    }
    metadata = {"format": _FORMAT, "kind": "checkpoint", "digest": digest(tensors, fields), **fields}
    with replacing(directory / name, error=CheckpointError) as temporary:
        temporary.write_bytes(encode(tensors, metadata))


def round_file_name(finished: int) -> str:
    """The name under which the model after so many rounds is kept."""
    return f"round-{finished:05d}.safetensors"


def clear_leftovers(directory: Path) -> None:
    """Remove the unfinished files of runs that were killed while they wrote a checkpoint."""
    for path in (*directory.glob(f".{FILE_NAME}.*.tmp"), *directory.glob(".round-*.tmp")):
        path.unlink(missing_ok=True)


def load_checkpoint(directory: Path, schema: Schema) -> Checkpoint | None:
    """Read the checkpoint of a directory.

    Args:
        directory: As given to `save_checkpoint`.
        schema: Of the model that the run is about.

    Returns:
        The checkpoint, None if there is none.

    Raises:
        CheckpointError: A file that is damaged, something else, or belongs to another architecture.
    """
    path = directory / FILE_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    try:
        return _parse(data, schema)
    except (CheckpointError, WireError) as error:
        raise CheckpointError(
            f"{path}: {error}; to start over, delete the file, give another checkpoint_dir, or pass resume=False"
        ) from error


def read_state_file(path: Path) -> ModelState:
    """The model of a checkpoint, without a model whose architecture says what to expect.

    Args:
        path: A file that `save_checkpoint` wrote.

    Raises:
        CheckpointError: A file that cannot be read, is damaged, or something else.
    """
    try:
        tensors, fields = _decoded(path.read_bytes())
        shapes = _stated_shapes(fields.get("shapes"))
        masks = {name: _mask(tensors, name, shape) for name, shape in shapes.items()}
        values = {name: tensors.pop(f"value/{name}") for name in masks}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: got no tensor {error}; expected one per mask") from error
    except (CheckpointError, WireError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    for name, mask in masks.items():
        if values[name].shape != (int(mask.count_nonzero()),):
            raise CheckpointError(
                f"{path}: {name}: got {list(values[name].shape)} values for {int(mask.count_nonzero())} weights"
            )
    dense = {key.removeprefix("dense/"): tensor for key, tensor in tensors.items() if key.startswith("dense/")}
    return ModelState(fields.get("version", 0), masks, values, dense)


def _stated_shapes(entry: object) -> dict[str, torch.Size]:
    if not isinstance(entry, dict) or not all(map(_is_shape, entry.values())):
        raise CheckpointError("got no shapes of the masks; expected a checkpoint that this version of fedmef_fx wrote")
    return {name: torch.Size(sizes) for name, sizes in entry.items()}


def _is_shape(sizes: object) -> bool:
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        return False
    return math.prod(sizes) < 2**48  # more overflows


def _decoded(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an undamaged checkpoint."""
    tensors, fields = decode(data)
    if (fields.pop("format", None), fields.pop("kind", None)) != (_FORMAT, "checkpoint"):
        raise CheckpointError("got another kind of file, or one of another version of fedmef_fx; expected a checkpoint")
    if fields.pop("digest", None) != digest(tensors, fields):
        raise CheckpointError("the digest does not fit the content: the file is damaged")
    return tensors, fields


def _mask(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    numel = shape.numel()
    bits = _take(tensors, f"mask/{name}", TensorSpec(torch.Size([bitmap_nbytes(numel)]), torch.uint8))
    return unpack_bits(bits, numel).reshape(shape)


def _parse(data: bytes, schema: Schema) -> Checkpoint:
    tensors, fields = _decoded(data)
    # From here on the content is what `save_checkpoint` wrote; it may still be another model's.
    masks = {name: _mask(tensors, name, spec.shape) for name, spec in schema.masked.items()}
    values = {
        name: _take(tensors, f"value/{name}", TensorSpec(torch.Size([int(masks[name].count_nonzero())]), spec.dtype))
        for name, spec in schema.masked.items()
    }
    dense = {name: _take(tensors, f"dense/{name}", spec) for name, spec in schema.dense.items()}
    memory = {key.removeprefix(_MEMORY): tensors.pop(key) for key in list(tensors) if key.startswith(_MEMORY)}
    clients: dict[int, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.startswith(_CLIENT)]:
        client, _, name = key.removeprefix(_CLIENT).partition("/")
        clients.setdefault(int(client), {})[name] = tensors.pop(key)
    if tensors:
        raise CheckpointError(f"got tensors that the model does not have: {', '.join(sorted(tensors))[:200]}")
    return Checkpoint(
        ModelState(fields["version"], masks, values, dense, fields.get("run", "")),
        changed=fields["changed"],
        known={int(client): version for client, version in fields["known"].items()},
        rounds=tuple(RoundRecord.from_dict(record) for record in fields["rounds"]),
        settings=fields["settings"],
        memory=memory,
        failures=tuple(map(Failure.from_json, fields.get("failures", []))),
        clients=clients,
    )


def _take(tensors: dict[str, Tensor], key: str, spec: TensorSpec) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None or TensorSpec.of(tensor) != spec:
        got = "nothing" if tensor is None else str(TensorSpec.of(tensor))
        raise CheckpointError(f"{key!r}: got {got}; expected {spec}: the checkpoint belongs to another architecture")
    return tensor
