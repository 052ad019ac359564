"""What server and clients say to each other in a round, as plain objects; `wire` turns them into bytes."""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["RoundTask", "Update"]


@dataclasses.dataclass(frozen=True, slots=True)
class RoundTask:
    """What the server asks for in a round.

    Attributes:
        round_index: t, counted from 0.
        rounds: Rounds of the whole run.
        counts: Parameter name -> k_l in an adjustment round, None in any other: how many weights a client marks for
            extrusion, and how many growth candidates it sends.
    """

    round_index: int
    rounds: int
    counts: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a client has after its local training.

    Attributes:
        round_index: The round it belongs to.
        samples: Number of local samples, >= 1: its weight in averages.
        loss: Mean training loss over the last local epoch.
        peak_saved_bytes: Bytes kept between forward and backward, measured on the first batch.
        values: Parameter name -> trained active values `[active]`.
        dense: Name -> tensor, of all other parameters and persistent buffers.
        gradients: Parameter name -> growth candidates; empty outside adjustment rounds.
    """

    round_index: int
    samples: int
    loss: float
    peak_saved_bytes: int
    values: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    gradients: Mapping[str, SparseGradient]
