"""Dropouts."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from torch import nn
from torch.nn import functional as F

from fedmef_fx.graph.operators.operator import Operator
from fedmef_fx.ops.dropout import BitDropout, bit_dropout

__all__ = ["ROWS"]


def _small(options: Mapping[str, Any]) -> partial[Any] | None:
    """A module follows the mode of the model; a call says itself whether it drops."""
    if "training" not in options:
        return partial(BitDropout, p=options["p"])
    p, training = options["p"], options["training"]
    static = isinstance(p, float | int) and isinstance(training, bool) and not options["inplace"]
    return partial(bit_dropout, p=p, training=training) if static else None


def _row(name: str, module: type[nn.Module], **facts: Any) -> Operator:
    return Operator.of_torch(name, spaces=(F,), modules=(module,), options=("p",), kind="dropout", **facts)


# They keep their noise, which is no activation.
ROWS: Final = (
    _row("dropout", nn.Dropout, keeps="nothing", small=_small),
    _row("dropout1d", nn.Dropout1d, keeps="nothing"),
    _row("dropout2d", nn.Dropout2d, keeps="nothing"),
    _row("dropout3d", nn.Dropout3d, keeps="nothing"),
    _row("alpha_dropout", nn.AlphaDropout),
    _row("feature_alpha_dropout", nn.FeatureAlphaDropout),
)
