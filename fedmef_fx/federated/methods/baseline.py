"""What all methods without FedMef's two ideas share."""

from typing import Literal

from fedmef_fx.federated.methods.method import Method
from fedmef_fx.federated.methods.policies import Adjustment, Opening

__all__ = ["baseline"]


def baseline(
    name: str,
    mask: Literal["dense", "random", "magnitude"] | Opening,
    adjustment: Literal["never", "server"] | Adjustment,
    *,
    exchange: str,
) -> Method:
    """A method without extrusion that keeps BatchNorm and exact activations; arguments as of `Method`."""
    return Method(
        name=name,
        initial_mask=mask,
        adjustment=adjustment,
        extrudes=False,
        activations="dense",
        normalization="keep",
        exchange=exchange,
    )
