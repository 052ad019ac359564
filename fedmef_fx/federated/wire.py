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
and in both directions what a strategy of one's own adds (`hooks`):
    extra/<name>     a tensor by any name
    change/<name>    what a weight changed by, in the place of the weight, in fewer bits (`uplink`); int8 with a scale/

Every message names its run, its round and, by a digest, the masks that it is about; an update names its client.
Decoding checks these, names, shapes, dtypes, counts, ranges, that numbers are finite and within `Limits`, and a
checksum. More bytes than the model allows are refused unread. Whatever the bytes, decoding raises `WireError` and
nothing else. How many bytes a message takes on the wire is its `len`.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from fedmef_fx.errors import MissingStateError, WireError
from fedmef_fx.federated.envelope import FORMAT, seal, unseal
from fedmef_fx.federated.limits import Limits, check_update
from fedmef_fx.federated.message_parts import (
    METRICS_BYTES,
    all_extras,
    dense_tensors,
    growth_candidates,
    integer,
    kept,
    metrics_of,
    own_mask,
    positions_alone,
    scores_of,
    take,
    unpack_mask,
)
from fedmef_fx.federated.messages import REPORTS, RoundTask, Update
from fedmef_fx.federated.positions import pack_positions
from fedmef_fx.federated.rounds import json_number
from fedmef_fx.federated.state import ModelState, Schema, TensorSpec
from fedmef_fx.federated.uplink import Uplink, change_sizes, coded_names, take_change, weights_before
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["FORMAT", "decode_broadcast", "decode_update", "encode_broadcast", "encode_update"]

# Most bytes of a position, see `positions`.
_POSITION_BYTES: Final = 6
# What a strategy may send along with a broadcast: as much as so many dense models.
_EXTRA_MODELS: Final = 8


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
    tensors |= {f"extra/{name}": tensor for name, tensor in task.extras.items()}
    counts = None if task.counts is None else dict(task.counts)
    fields: dict[str, Any] = {
        "run": state.run,
        "round": task.round_index,
        "rounds": task.rounds,
        "version": state.version,
        "known": known,
        "masks": state.mask_digest,
        "counts": counts,
    }
    if task.report != "gradients":
        fields["report"] = task.report
    return seal(tensors, "broadcast", fields)


def decode_broadcast(
    data: bytes, schema: Schema, *, previous: ModelState | None = None, takes_extras: bool = False
) -> tuple[RoundTask, ModelState]:
    """Read a broadcast.

    Args:
        data: The bytes.
        schema: Of the client's model.
        previous: What the client received last; fills in what has not changed since.
        takes_extras: Whether a strategy's tensors may come along; they are in `RoundTask.extras`.

    Returns:
        The task and the complete state of the server.

    Raises:
        MissingStateError: A broadcast that builds on a version that the client lacks.
        WireError: Bytes that are no broadcast for this model.
    """
    message = unseal(
        data,
        "broadcast",
        fields={"run", "round", "rounds", "version", "known", "masks", "counts"},
        optional={"report"},
        sizes=_broadcast_sizes(schema),
        room=_EXTRA_MODELS * schema.nbytes if takes_extras else 0,
    )
    tensors, fields = message.tensors, message.fields
    run = fields["run"]
    if not isinstance(run, str):
        raise WireError(f"broadcast: run: got {run!r:.40}; expected the name of a run")
    version = integer(fields, "version", low=0)
    known_version = None if fields["known"] is None else integer(fields, "known", low=0, high=version)
    if known_version is not None and (previous is None or not known_version <= previous.version <= version):
        have = "none" if previous is None else str(previous.version)
        raise MissingStateError(
            f"broadcast: got one that builds on version {known_version}; this client has {have}: ask the server for a "
            "complete one (known=None)"
        )
    base = previous if known_version is not None else None
    if base is not None and base.run != run:
        raise MissingStateError(
            f"broadcast: got one of run {run!r:.40} that builds on an earlier one; this client is in run "
            f"{base.run!r:.40}: ask the server for a complete one (known=None)"
        )
    masks = {
        name: unpack_mask(name, packed, spec)
        if (packed := tensors.pop(f"mask/{name}", None)) is not None
        else kept("mask", name, base.masks if base else {})
        for name, spec in schema.masked.items()
    }
    values = {
        name: take(tensors, f"value/{name}", TensorSpec(torch.Size([int(masks[name].count_nonzero())]), spec.dtype))
        for name, spec in schema.masked.items()
    }
    dense = dense_tensors(tensors, schema.dense, base.dense if base else {})
    state = ModelState(version, masks, values, dense, run)
    if fields["masks"] != state.mask_digest:
        raise (WireError if base is None else MissingStateError)(
            "broadcast: masks: the digest does not fit the masks that this client has: ask the server for a complete "
            "one (known=None)"
        )
    rounds = integer(fields, "rounds", low=1)
    round_index = integer(fields, "round", low=0, high=rounds - 1)
    wanted = fields.get("report", "gradients")
    report = next((name for name in REPORTS if name == wanted), None)
    if report is None:
        raise WireError(f"broadcast: report: got {wanted!r:.40}; expected one of {', '.join(REPORTS)}")
    extras = all_extras(tensors) if takes_extras else {}
    task = RoundTask(round_index, rounds, _counts(fields["counts"], masks), report, extras)
    message.check_all_read()
    return task, state


def _broadcast_sizes(schema: Schema) -> dict[str, int]:
    """Name of every tensor that a broadcast may have -> its most bytes."""
    sizes = {f"value/{name}": spec.nbytes for name, spec in schema.masked.items()}
    sizes |= {f"mask/{name}": bitmap_nbytes(spec.shape.numel()) for name, spec in schema.masked.items()}
    return sizes | {f"dense/{name}": spec.nbytes for name, spec in schema.dense.items()}


def encode_update(
    update: Update, *, received: ModelState, coded: Mapping[str, Tensor] | None = None, left_out: Collection[str] = ()
) -> bytes:
    """A client's answer.

    Args:
        update: What local training gave.
        received: The state that the client started from; what is equal to it is left out.
        coded: Changes of weights in fewer bits, see `uplink`; None for none.
        left_out: Names of the weights that these stand for.
    """
    changed = {
        name: t for name, t in update.dense.items() if name not in left_out and not torch.equal(t, received.dense[name])
    }
    positions = {name: gradient.positions for name, gradient in update.gradients.items()} | dict(update.votes)
    tensors = {f"value/{name}": values for name, values in update.values.items() if name not in left_out}
    tensors |= coded or {}
    tensors |= {f"dense/{name}": tensor for name, tensor in changed.items()}
    tensors |= {f"position/{name}": pack_positions(where) for name, where in positions.items()}
    tensors |= {f"gradient/{name}": gradient.values for name, gradient in update.gradients.items()}
    tensors |= {f"score/{name}": scores for name, scores in update.scores.items()}
    tensors |= {f"mask/{name}": pack_bits(mask) for name, mask in update.masks.items()}
    tensors |= {f"extra/{name}": tensor for name, tensor in update.extras.items()}
    fields: dict[str, Any] = {
        "run": received.run,
        "masks": received.mask_digest,
        "client": update.client,
        "round": update.round_index,
        "samples": update.samples,
        "loss": update.loss,
        "peak_saved_bytes": update.peak_saved_bytes,
    }
    if update.metrics:
        fields["metrics"] = {name: json_number(value) for name, value in update.metrics.items()}
    return seal(tensors, "update", fields)


def decode_update(  # all but the bytes by keyword
    data: bytes,
    *,
    task: RoundTask,
    sent: ModelState,
    client: int | None = None,
    samples: int | None = None,
    limits: Limits | None = None,
    expected: Mapping[str, Tensor] | None = None,
    uplink: Uplink = "exact",
    trained: Collection[str] = (),
) -> Update:
    """Read an update.

    Args:
        data: The bytes.
        task: What the client was asked for.
        sent: The state that it was sent; it also says what shapes to expect.
        client: Whose answer it has to be; None for anybody's.
        samples: How many samples that client has; None for any number.
        limits: What the update may not exceed; None for `Limits()`.
        expected: Tensors that a strategy wants besides, by name, of the shapes and dtypes of these; None where there is
            no strategy, which may add numbers, too.
        uplink: How changes of weights are coded.
        trained: Names of parameters without a mask, whose changes are, too.

    Raises:
        WireError: Bytes that are no answer to this task.
    """
    wanted = {f"extra/{name}": tensor for name, tensor in (expected or {}).items()}
    coded = coded_names(sent, trained, uplink) if task.asked.weights else []
    message = unseal(
        data,
        "update",
        fields={"run", "masks", "client", "round", "samples", "loss", "peak_saved_bytes"},
        optional=() if expected is None else {"metrics"},
        sizes=_update_sizes(task, sent, wanted, coded, uplink),
        room=0 if expected is None else METRICS_BYTES,
    )
    tensors, fields = message.tensors, message.fields
    integer(fields, "round", low=task.round_index, high=task.round_index)
    _check_origin(fields, sent, client=client, samples=samples)
    loss = fields["loss"]
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise WireError(f"update: loss: got {loss!r:.40}; expected a finite number")
    asked, counts = task.asked, task.counts or {}
    weights = sent.values if asked.weights else {}
    masks = {name: own_mask(tensors, name, mask) for name, mask in sent.masks.items()} if asked.masks else {}
    changed = {name: take_change(tensors, name, weights_before(sent, name, masks), uplink) for name in coded}
    values = {
        name: changed[name] if name in changed else take(tensors, f"value/{name}", TensorSpec.of(value))
        for name, value in weights.items()
    }
    specs = {name: TensorSpec.of(tensor) for name, tensor in sent.dense.items() if name not in changed}
    dense = dense_tensors(tensors, specs, sent.dense) | {n: t for n, t in changed.items() if n in sent.dense}
    scores = {name: scores_of(tensors, name, mask, task) for name, mask in sent.masks.items()} if asked.scores else {}
    gradients: dict[str, SparseGradient] = {}
    votes: dict[str, Tensor] = {}
    if asked.values:
        gradients = {name: growth_candidates(tensors, name, sent.masks[name], count) for name, count in counts.items()}
    elif asked.positions:
        votes = {name: positions_alone(tensors, name, sent.masks[name], count) for name, count in counts.items()}
    update = Update(
        round_index=task.round_index,
        samples=integer(fields, "samples", low=1),
        loss=loss,
        peak_saved_bytes=integer(fields, "peak_saved_bytes", low=0),
        values=values,
        dense=dense,
        gradients=gradients,
        votes=votes,
        scores=scores,
        masks=masks,
        client=integer(fields, "client", low=0),
        extras={
            key.removeprefix("extra/"): take(tensors, key, TensorSpec.of(tensor)) for key, tensor in wanted.items()
        },
        metrics=metrics_of(fields.get("metrics", {})),
    )
    message.check_all_read()
    check_update(update, sent, limits or Limits())
    return update


def _check_origin(fields: Mapping[str, object], sent: ModelState, *, client: int | None, samples: int | None) -> None:
    """Refuse what was made in another run, under other masks, by another client, or with other data."""
    if fields["run"] != sent.run:
        raise WireError(f"update: run: got {fields['run']!r:.40}; expected {sent.run!r}: an answer to another run")
    if fields["masks"] != sent.mask_digest:
        raise WireError(
            f"update: masks: got {fields['masks']!r:.40}; expected {sent.mask_digest!r}: trained under other masks"
        )
    if client is not None and integer(fields, "client", low=0) != client:
        raise WireError(f"update: client: got {fields['client']}; expected {client}: another client's update")
    if samples is not None and integer(fields, "samples", low=1) != samples:
        raise WireError(f"update: samples: got {fields['samples']}; expected {samples}, which this client declared")


def _update_sizes(
    task: RoundTask, sent: ModelState, wanted: Mapping[str, Tensor], coded: Collection[str], uplink: Uplink
) -> dict[str, int]:
    """Name of every tensor that an update may have -> its most bytes."""
    asked, counts = task.asked, task.counts or {}
    sizes = {key: tensor.nbytes for key, tensor in wanted.items()}
    sizes |= {f"dense/{name}": tensor.nbytes for name, tensor in sent.dense.items() if name not in coded}
    if asked.weights:
        sizes |= {f"value/{name}": values.nbytes for name, values in sent.values.items() if name not in coded}
    for name in coded:
        weight = sent.values[name] if name in sent.values else sent.dense[name]
        sizes |= change_sizes(name, weight.numel(), uplink)
    if asked.masks:
        sizes |= {f"mask/{name}": bitmap_nbytes(mask.numel()) for name, mask in sent.masks.items()}
    if asked.scores:
        sizes |= {f"score/{name}": mask.numel() * torch.float32.itemsize for name, mask in sent.masks.items()}
    if asked.positions:
        sizes |= {f"position/{name}": count * _POSITION_BYTES for name, count in counts.items()}
    if asked.values:
        sizes |= {f"gradient/{name}": count * torch.float64.itemsize for name, count in counts.items()}
    return sizes


def _counts(value: object, masks: Mapping[str, Tensor]) -> dict[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != masks.keys():
        raise WireError(f"broadcast: counts: got {value!r:.80}; expected one per masked parameter")
    for name, mask in masks.items():
        active = int(mask.count_nonzero())
        integer(value, name, low=0, high=min(active, mask.numel() - active))
    return value
