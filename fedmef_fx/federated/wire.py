"""The messages of a round as bytes. What goes over the wire is sparse in both directions.

Server -> client, a *broadcast* (`encode_broadcast`, `decode_broadcast`):
    value/<name>     the active values of a masked parameter, in its dtype: always
    mask/<name>      its mask, one bit per weight: where it changed since the version that the client has
    dense/<name>     any other parameter or buffer: the same
Client -> server, an *update* (`encode_update`, `decode_update`):
    value/<name>     the trained active values: always
    dense/<name>     any other parameter or buffer: where training changed it
and in adjustment rounds what the method asks for (`messages.REPORTS`); for FedMef the first two, no dense gradient:
    position/<name>  positions of the growth candidates, see `positions`
    gradient/<name>  their gradients
    score/<name>     a number for every weight, or every active one
    mask/<name>      the client's own mask, under which its values are

Decoding checks names, shapes, dtypes, counts, ranges and that numbers are finite. Whatever the bytes, it raises
`WireError` and nothing else. How many bytes a message takes on the wire is its `len`.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fedmef_fx.errors import FedmefError, WireError
from fedmef_fx.federated.messages import REPORTS, RoundTask, Update
from fedmef_fx.federated.positions import pack_positions, unpack_positions
from fedmef_fx.federated.state import ModelState, Schema, TensorSpec
from fedmef_fx.files.container import decode, encode
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["FORMAT", "decode_broadcast", "decode_update", "encode_broadcast", "encode_update"]

FORMAT: Final = 1
"""Version of the format; a peer of another version is refused."""

# Any count of rounds, samples or bytes; JSON numbers up to here are exact everywhere.
_LARGEST: Final = 2**53


def encode_broadcast(
    task: RoundTask, state: ModelState, *, changed: Mapping[str, int], known: int | None = None
) -> bytes:
    """The server's message to one client.

    Args:
        task: What the client is to do.
        state: The server's model.
        changed: Name of each mask's parameter and each dense tensor -> the version in which it last changed.
        known: The version that the client has; None if it has none.
    """
    names = {name for name, version in changed.items() if known is None or version > known}
    tensors = {f"value/{name}": values for name, values in state.values.items()}
    tensors |= {f"mask/{name}": pack_bits(mask) for name, mask in state.masks.items() if name in names}
    tensors |= {f"dense/{name}": tensor for name, tensor in state.dense.items() if name in names}
    counts = None if task.counts is None else dict(task.counts)
    rounds: dict[str, Any] = {"round": task.round_index, "rounds": task.rounds}
    if task.report != "gradients":
        rounds["report"] = task.report
    return encode(
        tensors,
        {"format": FORMAT, "kind": "broadcast", **rounds, "version": state.version, "known": known, "counts": counts},
    )


def decode_broadcast(
    data: bytes, schema: Schema, *, previous: ModelState | None = None
) -> tuple[RoundTask, ModelState]:
    """Read a broadcast.

    Args:
        data: The bytes.
        schema: Of the client's model.
        previous: What the client received last; fills in what has not changed since.

    Returns:
        The task and the complete state of the server.

    Raises:
        WireError: Bytes that are no broadcast for this model, or that build on a version that the client lacks.
    """
    tensors, fields = _open(data, "broadcast", {"round", "rounds", "version", "known", "counts"}, {"report"})
    version = _integer(fields, "version", low=0)
    known_version = None if fields["known"] is None else _integer(fields, "known", low=0, high=version)
    if known_version is not None and (previous is None or not known_version <= previous.version <= version):
        have = "none" if previous is None else str(previous.version)
        raise WireError(
            f"broadcast: got one that builds on version {known_version}; this client has {have}: ask the server for a "
            "complete one (known=None)"
        )
    base = previous if known_version is not None else None
    masks = {
        name: _unpack_mask(name, packed, spec)
        if (packed := tensors.pop(f"mask/{name}", None)) is not None
        else _kept("mask", name, base.masks if base else {})
        for name, spec in schema.masked.items()
    }
    values = {
        name: _take(tensors, f"value/{name}", TensorSpec(torch.Size([int(masks[name].count_nonzero())]), spec.dtype))
        for name, spec in schema.masked.items()
    }
    dense = _dense(tensors, schema.dense, base.dense if base else {})
    _expect_nothing_left(tensors)
    rounds = _integer(fields, "rounds", low=1)
    round_index = _integer(fields, "round", low=0, high=rounds - 1)
    wanted = fields.get("report", "gradients")
    report = next((name for name in REPORTS if name == wanted), None)
    if report is None:
        raise WireError(f"broadcast: report: got {wanted!r:.40}; expected one of {', '.join(REPORTS)}")
    task = RoundTask(round_index, rounds, _counts(fields["counts"], masks), report)
    return task, ModelState(version, masks, values, dense)


def encode_update(update: Update, *, received: ModelState) -> bytes:
    """A client's answer.

    Args:
        update: What local training gave.
        received: The state that the client started from; what is equal to it is left out.
    """
    changed = {name: t for name, t in update.dense.items() if not torch.equal(t, received.dense[name])}
    positions = {name: gradient.positions for name, gradient in update.gradients.items()} | dict(update.votes)
    tensors = {f"value/{name}": values for name, values in update.values.items()}
    tensors |= {f"dense/{name}": tensor for name, tensor in changed.items()}
    tensors |= {f"position/{name}": pack_positions(where) for name, where in positions.items()}
    tensors |= {f"gradient/{name}": gradient.values for name, gradient in update.gradients.items()}
    tensors |= {f"score/{name}": scores for name, scores in update.scores.items()}
    tensors |= {f"mask/{name}": pack_bits(mask) for name, mask in update.masks.items()}
    fields = {
        "round": update.round_index,
        "samples": update.samples,
        "loss": update.loss,
        "peak_saved_bytes": update.peak_saved_bytes,
    }
    return encode(tensors, {"format": FORMAT, "kind": "update", **fields})


def decode_update(data: bytes, *, task: RoundTask, sent: ModelState) -> Update:
    """Read an update.

    Args:
        data: The bytes.
        task: What the client was asked for.
        sent: The state that it was sent; it also says what shapes to expect.

    Raises:
        WireError: Bytes that are no answer to this task.
    """
    tensors, fields = _open(data, "update", {"round", "samples", "loss", "peak_saved_bytes"})
    _integer(fields, "round", low=task.round_index, high=task.round_index)
    loss = fields["loss"]
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise WireError(f"update: loss: got {loss!r:.40}; expected a finite number")
    asked, counts = task.asked, task.counts or {}
    weights = sent.values if asked.weights else {}
    values = {name: _take(tensors, f"value/{name}", TensorSpec.of(value)) for name, value in weights.items()}
    specs = {name: TensorSpec.of(tensor) for name, tensor in sent.dense.items()}
    dense = _dense(tensors, specs, sent.dense)
    masks = {name: _own_mask(tensors, name, mask) for name, mask in sent.masks.items()} if asked.masks else {}
    scores = {name: _scores(tensors, name, mask, task) for name, mask in sent.masks.items()} if asked.scores else {}
    gradients: dict[str, SparseGradient] = {}
    votes: dict[str, Tensor] = {}
    if asked.values:
        gradients = {name: _gradient(tensors, name, sent.masks[name], count) for name, count in counts.items()}
    elif asked.positions:
        votes = {name: _votes(tensors, name, sent.masks[name], count) for name, count in counts.items()}
    _expect_nothing_left(tensors)
    return Update(
        round_index=task.round_index,
        samples=_integer(fields, "samples", low=1),
        loss=loss,
        peak_saved_bytes=_integer(fields, "peak_saved_bytes", low=0),
        values=values,
        dense=dense,
        gradients=gradients,
        votes=votes,
        scores=scores,
        masks=masks,
    )


def _open(
    data: bytes, kind: str, expected: set[str], optional: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, fields = decode(data)
    header = fields.pop("format", None), fields.pop("kind", None)
    if header != (FORMAT, kind):
        raise WireError(f"{kind}: got format {header[0]!r:.40}, kind {header[1]!r:.40}; expected {FORMAT}, {kind!r}")
    if fields.keys() - set(optional) != expected:
        raise WireError(f"{kind}: got fields {sorted(fields)!r:.200}; expected {sorted(expected)}")
    return tensors, fields


def _integer(fields: Mapping[str, object], name: str, *, low: int, high: int = _LARGEST) -> int:
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"message: {name}: got {value!r:.40}; expected an integer in [{low}, {high}]")
    return value


def _take(tensors: dict[str, Tensor], key: str, spec: TensorSpec) -> Tensor:
    """Remove one tensor from the message and check it."""
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise WireError(f"message: {key!r} is missing; expected {spec}")
    if TensorSpec.of(tensor) != spec:
        raise WireError(f"message: {key!r}: got {TensorSpec.of(tensor)}; expected {spec}: another model, or topology")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise WireError(f"message: {key!r}: got infinite values or NaN; expected finite ones: training has diverged")
    return tensor


def _dense(
    tensors: dict[str, Tensor], specs: Mapping[str, TensorSpec], unchanged: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The dense tensors of a message, completed by those that did not change."""
    return {
        name: _take(tensors, f"dense/{name}", spec) if f"dense/{name}" in tensors else _kept("dense", name, unchanged)
        for name, spec in specs.items()
    }


def _kept(what: str, name: str, unchanged: Mapping[str, Tensor]) -> Tensor:
    if name not in unchanged:
        raise WireError(f"message: '{what}/{name}' is missing; expected it, as the receiver has no earlier version")
    return unchanged[name]


def _unpack_mask(name: str, packed: Tensor, spec: TensorSpec) -> Tensor:
    numel = spec.shape.numel()
    expected = TensorSpec(torch.Size([bitmap_nbytes(numel)]), torch.uint8)
    if TensorSpec.of(packed) != expected:
        raise WireError(f"message: 'mask/{name}': got {TensorSpec.of(packed)}; expected {expected}: another model")
    mask = unpack_bits(packed, numel)
    if not torch.equal(pack_bits(mask), packed):
        raise WireError(f"message: 'mask/{name}': got bits behind the last weight; expected zeros there")
    return mask.reshape(spec.shape)


def _counts(value: object, masks: Mapping[str, Tensor]) -> dict[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != masks.keys():
        raise WireError(f"broadcast: counts: got {value!r:.80}; expected one per masked parameter")
    for name, mask in masks.items():
        active = int(mask.count_nonzero())
        _integer(value, name, low=0, high=min(active, mask.numel() - active))
    return value


def _gradient(tensors: dict[str, Tensor], name: str, mask: Tensor, count: int) -> SparseGradient:
    """Growth candidates of one parameter: at most as many as were asked for, at inactive positions only."""
    packed, values = tensors.pop(f"position/{name}", None), tensors.pop(f"gradient/{name}", None)
    if packed is None or values is None:
        raise WireError(f"update: {name!r}: got no growth candidates in an adjustment round; expected up to {count}")
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise WireError(f"update: 'position/{name}': got {TensorSpec.of(packed)}; expected packed positions")
    if values.dtype not in (torch.float32, torch.float64) or values.dim() != 1 or values.numel() > count:
        raise WireError(f"update: 'gradient/{name}': got {TensorSpec.of(values)}; expected up to {count} numbers")
    positions = _inactive(packed, name, mask, count=values.numel())
    try:
        return SparseGradient(positions, values, mask.numel())
    except FedmefError as error:
        raise WireError(f"update: {name!r}: {error}") from error


def _inactive(packed: Tensor, name: str, mask: Tensor, *, count: int) -> Tensor:
    """Positions of inactive weights."""
    positions = unpack_positions(packed, count=count, numel=mask.numel())
    if bool(torch.take(mask, positions).any()):
        raise WireError(f"update: 'position/{name}': got positions of active weights; expected inactive ones only")
    return positions


def _votes(tensors: dict[str, Tensor], name: str, mask: Tensor, count: int) -> Tensor:
    """Growth candidates without values: their number is not stated, every byte below 128 ends one."""
    packed = tensors.pop(f"position/{name}", None)
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        got = "nothing" if packed is None else str(TensorSpec.of(packed))
        raise WireError(f"update: 'position/{name}': got {got}; expected packed positions")
    found = int((packed < 0x80).count_nonzero())
    if found > count:
        raise WireError(f"update: 'position/{name}': got {found} positions; expected up to {count}")
    return _inactive(packed, name, mask, count=found)


def _scores(tensors: dict[str, Tensor], name: str, mask: Tensor, task: RoundTask) -> Tensor:
    """A finite number for every weight, or every active one."""
    count = mask.numel() if task.asked.scores == "all" else int(mask.count_nonzero())
    return _take(tensors, f"score/{name}", TensorSpec(torch.Size([count]), torch.float32))


def _own_mask(tensors: dict[str, Tensor], name: str, sent: Tensor) -> Tensor:
    """A client's own mask, with as many active weights as it was sent: so the shapes of its values are known."""
    packed = tensors.pop(f"mask/{name}", None)
    if packed is None:
        raise WireError(f"update: 'mask/{name}' is missing; expected the client's own mask in an adjustment round")
    mask = _unpack_mask(name, packed, TensorSpec.of(sent))
    if int(mask.count_nonzero()) != int(sent.count_nonzero()):
        raise WireError(
            f"update: 'mask/{name}': got {int(mask.count_nonzero())} active weights; expected "
            f"{int(sent.count_nonzero())}, as many as were sent"
        )
    return mask


def _expect_nothing_left(tensors: Iterable[str]) -> None:
    unknown = sorted(tensors)
    if unknown:
        raise WireError(f"message: got unknown tensors {unknown!r:.200}; expected only what the model has")
