"""What server and clients say to each other in a round, as plain objects; `wire` turns them into bytes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Final, Literal

from torch import Tensor

from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = ["MOST_METRICS", "NOTHING", "REPORTS", "Report", "ReportName", "RoundTask", "Update", "is_metric_name"]

MOST_METRICS: Final = 64
"""How many numbers of its own a client may send."""


def is_metric_name(name: object) -> bool:
    """Whether a number of a client's own may have this name: at most 64 plain characters."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_ .:/@%+()-]{1,64}", name) is not None


ReportName = Literal["gradients", "positions", "masks", "squares", "fisher", "gradient", "saliency"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a client sends for the adjustment of masks, of each masked parameter.

    Attributes:
        positions: Growth candidates: positions of inactive coordinates.
        values: A number with each of these positions.
        scores: Numbers for `"all"` weights, or for the `"active"` ones.
        masks: The client's own mask, under which its weights are sent.
        weights: Whether trained weights are sent, too. Without them a report comes before the first round.
    """

    positions: bool = False
    values: bool = False
    scores: Literal["all", "active"] | None = None
    masks: bool = False
    weights: bool = True


NOTHING: Final = Report()
REPORTS: Final[Mapping[ReportName, Report]] = {
    "gradients": Report(positions=True, values=True),
    "positions": Report(positions=True),
    "masks": Report(masks=True),
    "squares": Report(scores="all"),
    "fisher": Report(positions=True, values=True, scores="active"),
    "gradient": Report(scores="all", weights=False),
    "saliency": Report(scores="all", weights=False),
}
"""By name: the largest gradients at inactive coordinates; their positions alone; own masks; the squared gradient of
every weight; scores by the diagonal of the Fisher matrix; before the first round the gradient of every weight, or
|g * w|."""


@dataclasses.dataclass(frozen=True, slots=True)
class RoundTask:
    """What the server asks for in a round.

    Attributes:
        round_index: t, counted from 0.
        rounds: Rounds of the whole run.
        counts: Parameter name -> k_l in an adjustment round, None in any other: how many weights a client marks for
            extrusion, and how many growth candidates it sends.
        report: What clients send besides in adjustment rounds; a report without weights is asked for before round 0.
        extras: Tensors that a strategy sends along, by name.
    """

    round_index: int
    rounds: int
    counts: Mapping[str, int] | None = None
    report: ReportName = "gradients"
    extras: Mapping[str, Tensor] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def is_opening(self) -> bool:
        """Whether weights are only scored, before the first round."""
        return not REPORTS[self.report].weights

    @property
    def asked(self) -> Report:
        """What clients send besides weights in this round."""
        return REPORTS[self.report] if self.counts is not None or self.is_opening else NOTHING


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What a client has after its local training.

    Attributes:
        round_index: The round it belongs to.
        samples: Number of local samples, >= 1: its weight in averages.
        loss: Mean training loss over the last local epoch.
        peak_saved_bytes: Bytes kept between forward and backward, measured on the first batch.
        values: Parameter name -> trained active values `[active]`, under `masks` where there are any.
        dense: Name -> tensor, of all other parameters and persistent buffers.
        gradients: Parameter name -> growth candidates; empty outside adjustment rounds.
        votes: Parameter name -> positions of growth candidates alone, int64 ascending, where no values are asked for.
        scores: Parameter name -> scores `[numel]` or `[active]`, where they are asked for.
        masks: Parameter name -> the client's own mask, where it is asked for.
        client: Whose it is.
        extras: Tensors that a strategy adds, by name.
        metrics: Numbers that a strategy adds, by name; they may be infinite or NaN.
    """

    round_index: int
    samples: int
    loss: float
    peak_saved_bytes: int
    values: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    gradients: Mapping[str, SparseGradient] = dataclasses.field(default_factory=dict)
    votes: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    masks: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    client: int = 0
    extras: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
