"""Fewer bytes from clients: changes of weights in 16 or 8 bits, with error feedback.

    c = w - w_sent + e          e: what earlier rounds lost, kept by the client (0 at first, and for weights that grew)
    sent: code(c)               float16, or int8 with a scale of absmax / 127 for each 256 in a row
    e   = c - decoded           so what a code loses comes later (Seide et al., 2014; Karimireddy et al., 2019)

Coded are masked weights (their active values) and floating-point parameters without a mask, of 256 numbers or more:
shorter ones take fewer bytes as they are. So travel buffers, growth candidates and scores.
"""

from collections.abc import Collection, Mapping
from typing import Final, Literal

import torch
from torch import Tensor

from fedmef_fx.errors import WireError
from fedmef_fx.federated.aligned import recalled, remember, under
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.state import ModelState, TensorSpec

__all__ = ["UPLINKS", "Uplink", "change_sizes", "coded_changes", "coded_names", "take_change", "weights_before"]

Uplink = Literal["exact", "float16", "int8"]

UPLINKS: Final = ("exact", "float16", "int8")

_BLOCK: Final = 256
_LARGEST: Final = {"float16": 65504.0, "int8": 127.0}
_FEEDBACK: Final = "uplink"  # the group of what a client keeps


def coded_names(sent: ModelState, trained: Collection[str], uplink: Uplink) -> list[str]:
    """Names of the weights whose changes are coded.

    Args:
        sent: What clients start from.
        trained: Names of parameters without a mask.
        uplink: The code.
    """
    if uplink == "exact":
        return []
    weights = {**sent.values, **{name: sent.dense[name] for name in trained}}
    return [name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.numel() >= _BLOCK]


def weights_before(sent: ModelState, name: str, masks: Mapping[str, Tensor]) -> Tensor:
    """A weight as it was sent, under a client's own mask where it has one."""
    if name not in sent.values:
        return sent.dense[name]
    return under(sent.values[name], sent.masks[name], masks.get(name, sent.masks[name]))


def coded_changes(
    update: Update, sent: ModelState, names: Collection[str], uplink: Uplink, kept: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a message, in the place of those weights.

    Args:
        update: What local training gave.
        sent: What it started from.
        names: See `coded_names`.
        uplink: The code.
        kept: What the client keeps from round to round; changed in place.
    """
    masks = {name: update.masks.get(name, mask) for name, mask in sent.masks.items()}
    weights = {name: update.values.get(name, update.dense.get(name)) for name in names}
    found = {name: weight for name, weight in weights.items() if weight is not None}
    errors = recalled(kept, _FEEDBACK, {name: weight.float() for name, weight in found.items()}, masks)
    tensors: dict[str, Tensor] = {}
    left = {}
    for name, weight in found.items():
        change = weight.float() - weights_before(sent, name, update.masks).float() + errors[name]
        coded = _encoded(change.flatten(), uplink)
        tensors |= {f"{part}/{name}": tensor for part, tensor in coded.items()}
        left[name] = change - _decoded(coded["change"], coded.get("scale")).reshape(change.shape)
    remember(kept, _FEEDBACK, left, masks)
    return tensors


def take_change(tensors: dict[str, Tensor], name: str, before: Tensor, uplink: Uplink) -> Tensor:
    """Remove one coded change from a message, check it, and add it to what was sent.

    Raises:
        WireError: It is missing, of another form, or not finite.
    """
    numel = before.numel()
    change = _take(tensors, f"change/{name}", TensorSpec(torch.Size([numel]), getattr(torch, uplink)))
    scale = None
    if uplink == "int8":
        scale = _take(tensors, f"scale/{name}", TensorSpec(torch.Size([_blocks(numel)]), torch.float32))
    return (before.float() + _decoded(change, scale).reshape(before.shape)).to(before.dtype)


def change_sizes(name: str, numel: int, uplink: Uplink) -> dict[str, int]:
    """Name of every tensor of a coded change -> its bytes."""
    if uplink == "float16":
        return {f"change/{name}": 2 * numel}
    return {f"change/{name}": numel, f"scale/{name}": 4 * _blocks(numel)}


def _take(tensors: dict[str, Tensor], key: str, spec: TensorSpec) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None or TensorSpec.of(tensor) != spec:
        got = "nothing" if tensor is None else str(TensorSpec.of(tensor))
        raise WireError(f"update: {key!r}: got {got}; expected {spec}: another uplink, model or topology")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise WireError(f"update: {key!r}: got infinite values or NaN; expected finite ones: training has diverged")
    return tensor


def _blocks(numel: int) -> int:
    return -(-numel // _BLOCK)


def _encoded(change: Tensor, uplink: Uplink) -> dict[str, Tensor]:
    if uplink == "float16":
        # Larger ones would become infinite; what is cut off comes with the next round.
        return {"change": change.clamp(-_LARGEST[uplink], _LARGEST[uplink]).half()}
    rows = torch.nn.functional.pad(change, (0, -len(change) % _BLOCK)).reshape(-1, _BLOCK)
    scale = rows.abs().amax(1) / _LARGEST[uplink]
    codes = (rows / torch.where(scale > 0, scale, 1.0).unsqueeze(1)).round_().clamp_(-127, 127)
    return {"change": codes.nan_to_num(0.0).to(torch.int8).flatten()[: len(change)].clone(), "scale": scale}


def _decoded(change: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return change.float()
    return change.float() * scale.repeat_interleave(_BLOCK)[: len(change)]
