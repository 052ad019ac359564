"""The parts of a message, and what they have to be: names, shapes, dtypes, counts, ranges, finite numbers."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import FedmefError, WireError
from fedmef_fx.federated.messages import MOST_METRICS, RoundTask, is_metric_name
from fedmef_fx.federated.positions import unpack_positions
from fedmef_fx.federated.state import TensorSpec
from fedmef_fx.packing.bitmap import bitmap_nbytes, pack_bits, unpack_bits
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = [
    "METRICS_BYTES",
    "all_extras",
    "dense_tensors",
    "growth_candidates",
    "integer",
    "kept",
    "metrics_of",
    "own_mask",
    "positions_alone",
    "scores_of",
    "take",
    "unpack_mask",
]

# Any count of rounds, samples or bytes; JSON numbers up to here are exact everywhere.
_LARGEST: Final = 2**53

METRICS_BYTES: Final = MOST_METRICS * 128
"""Most bytes of a header that a client's own numbers take."""


def integer(fields: Mapping[str, object], name: str, *, low: int, high: int = _LARGEST) -> int:
    """A field that is an integer within bounds."""
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"message: {name}: got {value!r:.40}; expected an integer in [{low}, {high}]")
    return value


def take(tensors: dict[str, Tensor], key: str, spec: TensorSpec) -> Tensor:
    """Remove one tensor from the message and check it."""
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise WireError(f"message: {key!r} is missing; expected {spec}")
    if TensorSpec.of(tensor) != spec:
        raise WireError(f"message: {key!r}: got {TensorSpec.of(tensor)}; expected {spec}: another model, or topology")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise WireError(f"message: {key!r}: got infinite values or NaN; expected finite ones: training has diverged")
    return tensor


def dense_tensors(
    tensors: dict[str, Tensor], specs: Mapping[str, TensorSpec], unchanged: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The dense tensors of a message, completed by those that did not change."""
    return {
        name: take(tensors, f"dense/{name}", spec) if f"dense/{name}" in tensors else kept("dense", name, unchanged)
        for name, spec in specs.items()
    }


def kept(what: str, name: str, unchanged: Mapping[str, Tensor]) -> Tensor:
    """What a message leaves out, because it has not changed."""
    if name not in unchanged:
        raise WireError(f"message: '{what}/{name}' is missing; expected it, as the receiver has no earlier version")
    return unchanged[name]


def unpack_mask(name: str, packed: Tensor, spec: TensorSpec) -> Tensor:
    """A mask from its bits."""
    numel = spec.shape.numel()
    expected = TensorSpec(torch.Size([bitmap_nbytes(numel)]), torch.uint8)
    if TensorSpec.of(packed) != expected:
        raise WireError(f"message: 'mask/{name}': got {TensorSpec.of(packed)}; expected {expected}: another model")
    mask = unpack_bits(packed, numel)
    if not torch.equal(pack_bits(mask), packed):
        raise WireError(f"message: 'mask/{name}': got bits behind the last weight; expected zeros there")
    return mask.reshape(spec.shape)


def growth_candidates(tensors: dict[str, Tensor], name: str, mask: Tensor, count: int) -> SparseGradient:
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


def positions_alone(tensors: dict[str, Tensor], name: str, mask: Tensor, count: int) -> Tensor:
    """Growth candidates without values: their number is not stated, every byte below 128 ends one."""
    packed = tensors.pop(f"position/{name}", None)
    if packed is None or packed.dtype != torch.uint8 or packed.dim() != 1:
        got = "nothing" if packed is None else str(TensorSpec.of(packed))
        raise WireError(f"update: 'position/{name}': got {got}; expected packed positions")
    found = int((packed < 0x80).count_nonzero())
    if found > count:
        raise WireError(f"update: 'position/{name}': got {found} positions; expected up to {count}")
    return _inactive(packed, name, mask, count=found)


def scores_of(tensors: dict[str, Tensor], name: str, mask: Tensor, task: RoundTask) -> Tensor:
    """A finite number for every weight, or every active one."""
    count = mask.numel() if task.asked.scores == "all" else int(mask.count_nonzero())
    return take(tensors, f"score/{name}", TensorSpec(torch.Size([count]), torch.float32))


def own_mask(tensors: dict[str, Tensor], name: str, sent: Tensor) -> Tensor:
    """A client's own mask, with as many active weights as it was sent: so the shapes of its values are known."""
    packed = tensors.pop(f"mask/{name}", None)
    if packed is None:
        raise WireError(f"update: 'mask/{name}' is missing; expected the client's own mask in an adjustment round")
    mask = unpack_mask(name, packed, TensorSpec.of(sent))
    if int(mask.count_nonzero()) != int(sent.count_nonzero()):
        raise WireError(
            f"update: 'mask/{name}': got {int(mask.count_nonzero())} active weights; expected "
            f"{int(sent.count_nonzero())}, as many as were sent"
        )
    return mask


def all_extras(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove and check all that a strategy added to a broadcast."""
    keys = [key for key in tensors if key.startswith("extra/")]
    return {key.removeprefix("extra/"): take(tensors, key, TensorSpec.of(tensors[key])) for key in keys}


def metrics_of(entry: object) -> dict[str, float]:
    """A client's own numbers, by name."""
    if not isinstance(entry, dict) or len(entry) > MOST_METRICS:
        raise WireError(f"update: metrics: got {entry!r:.80}; expected at most {MOST_METRICS} numbers by name")
    result = {}
    for name, value in entry.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308
        if not is_metric_name(name) or not (is_number or value in ("nan", "inf", "-inf")):
            raise WireError(f"update: metrics: got {name!r:.80}: {value!r:.40}; expected a number by a short name")
        result[name] = float(value)
    return result
