"""Normalisations."""

import dataclasses
from typing import Any, Final

from torch import nn
from torch.nn import functional as F

from fedmef_fx.graph.operators.operator import Keeps, Operator

__all__ = ["ROWS", "Norm"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm(Operator):
    """A normalisation with a scale and a shift.

    Attributes:
        size: The argument that says what is normalised together; empty for none.
        size_in_op: What `compressed_norm` calls it.
        has_shift: Whether its function takes a shift after the scale.
        is_recomputed: Whether its result is computed again rather than kept, where its input is kept.
    """

    keeps: Keeps = "inputs"
    has_other_parameters: bool = True
    size: str = ""
    size_in_op: str = ""
    has_shift: bool = True
    is_recomputed: bool = False


def _per_sample(name: str, *modules: type[nn.Module], options: tuple[str, ...] = (), **facts: Any) -> Norm:
    options = (*options, "eps")
    return Norm.of_torch(name, spaces=(F,), modules=modules, options=options, in_8_bits="norm", **facts)


_BATCH_NORM: dict[str, Any] = {
    "kind": "batch_norm",
    "options": (*_TENSORS, "eps"),
    "sizes": (("num_features", "weight", 0), ("num_features", "running_mean", 0)),
}

ROWS: Final = (
    Norm.of_torch(
        "batch_norm",
        spaces=(F,),
        modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        in_8_bits="batch_norm",
        **_BATCH_NORM,
    ),
    Norm(name="sync_batch_norm", modules=(nn.SyncBatchNorm,), **_BATCH_NORM | {"keeps": "both"}),
    Norm(name="batch_norm_base", modules=(nn.modules.batchnorm._BatchNorm,), **_BATCH_NORM | {"keeps": "both"}),
    _per_sample(
        "group_norm",
        nn.GroupNorm,
        options=("num_groups",),
        kind="group_norm",
        size="num_groups",
        size_in_op="groups",
        is_recomputed=True,
    ),
    _per_sample(
        "instance_norm",
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        options=("running_mean", "running_var"),
        sizes=_BATCH_NORM["sizes"],
    ),
    _per_sample(
        "layer_norm",
        nn.LayerNorm,
        options=("normalized_shape",),
        kind="layer_norm",
        size="normalized_shape",
        size_in_op="shape",
        is_recomputed=True,
    ),
    _per_sample(
        "rms_norm",
        nn.RMSNorm,
        options=("normalized_shape",),
        kind="layer_norm",
        size="normalized_shape",
        size_in_op="shape",
        has_shift=False,
        keeps="both",
    ),
)
