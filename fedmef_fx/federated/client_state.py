"""What a client keeps between rounds, as a file: masks and dense tensors of the last broadcast, a strategy's tensors.

Active values are not part of it: every broadcast brings all of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from fedmef_fx.errors import CheckpointError, WireError
from fedmef_fx.federated.message_parts import dense_tensors, integer, unpack_mask
from fedmef_fx.federated.state import ModelState, Schema
from fedmef_fx.files.atomic import check_target, replacing
from fedmef_fx.files.container import decode, digest, encode
from fedmef_fx.packing.bitmap import pack_bits

__all__ = ["decoded_client_state", "encoded_client_state", "read_client_state", "write_client_state"]

_FORMAT: Final = 1
_KIND: Final = "client"
_KEPT: Final = "client/"


States = Mapping[int, Mapping[str, Tensor]]
"""Number of a client -> what a strategy keeps of it, by name."""


def write_client_state(path: str | Path, received: ModelState | None, states: States | None = None) -> None:
    """Write what a client keeps; the file is either the old one or complete.

    Args:
        path: The file to be.
        received: The last broadcast; None before the first.
        states: What a strategy keeps of clients; None for nothing.

    Raises:
        CheckpointError: The file cannot be written.
    """
    target = check_target(path, error=CheckpointError)
    with replacing(target, error=CheckpointError) as temporary:
        temporary.write_bytes(encoded_client_state(received, states))


def encoded_client_state(received: ModelState | None, states: States | None = None) -> bytes:
    """The bytes of the file that `write_client_state` writes."""
    masks, dense = (received.masks, received.dense) if received else ({}, {})
    tensors = {f"mask/{name}": pack_bits(mask) for name, mask in masks.items()}
    tensors |= {f"dense/{name}": tensor for name, tensor in dense.items()}
    for client, kept in (states or {}).items():
        tensors |= {f"{_KEPT}{client}/{name}": tensor for name, tensor in kept.items()}
    fields = {"version": received.version if received else None, "run": received.run if received else ""}
    metadata = {"format": _FORMAT, "kind": _KIND, "digest": digest(tensors, fields), **fields}
    return encode(tensors, metadata)


def read_client_state(path: str | Path, schema: Schema) -> tuple[ModelState | None, dict[int, dict[str, Tensor]]]:
    """Read what `write_client_state` wrote.

    Args:
        path: The file.
        schema: Of the client's model.

    Returns:
        The last broadcast, without its active values, None where there was none yet; and what a strategy keeps.

    Raises:
        CheckpointError: A file that is missing, damaged, something else, or of another model.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; expected a file that Client.save wrote") from error
    return decoded_client_state(data, schema, where=str(path))


def decoded_client_state(
    data: bytes, schema: Schema, *, where: str
) -> tuple[ModelState | None, dict[int, dict[str, Tensor]]]:
    """Read bytes that `encoded_client_state` made.

    Args:
        data: The bytes.
        schema: Of the client's model.
        where: Where they come from, for the error.

    Raises:
        CheckpointError: They are damaged, something else, or of another model.
    """
    try:
        return _parsed(data, schema)
    except WireError as error:
        raise CheckpointError(
            f"{where}: {error}; expected a file that Client.save wrote for this model: a client without one is sent "
            "everything again, so the file may be deleted"
        ) from error


def _parsed(data: bytes, schema: Schema) -> tuple[ModelState | None, dict[int, dict[str, Tensor]]]:
    tensors, fields = decode(data)
    if (fields.pop("format", None), fields.pop("kind", None)) != (_FORMAT, _KIND):
        raise WireError("got another kind of file, or one of another version of fedmef_fx")
    if fields.pop("digest", None) != digest(tensors, fields):
        raise WireError("the digest does not fit the content: the file is damaged")
    states = _kept(tensors)
    if fields["version"] is None:
        return None, states
    packed = {name: tensors.pop(f"mask/{name}", None) for name in schema.masked}
    missing = [name for name, mask in packed.items() if mask is None]
    if missing:
        raise WireError(f"got no mask for {', '.join(missing)[:200]}: the file belongs to another model")
    masks = {name: unpack_mask(name, mask, schema.masked[name]) for name, mask in packed.items() if mask is not None}
    dense = dense_tensors(tensors, schema.dense, {})
    if tensors.keys() - {f"dense/{name}" for name in dense}:
        raise WireError(f"got tensors that the model does not have: {', '.join(sorted(tensors))[:200]}")
    return ModelState(integer(fields, "version", low=0), masks, {}, dense, str(fields["run"])), states


def _kept(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Remove what a strategy keeps of clients."""
    states: dict[int, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.startswith(_KEPT)]:
        client, _, name = key.removeprefix(_KEPT).partition("/")
        if not client.isdecimal():
            raise WireError(f"got a tensor {key!r:.80}: expected the number of a client in its name")
        states.setdefault(int(client), {})[name] = tensors.pop(key)
    return states
