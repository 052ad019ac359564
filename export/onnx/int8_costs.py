"""What int8 costs a model: how far its outputs move on calibration data, and how often a classifier chooses otherwise.

Of a row of class scores, let m be the lead of the best class over the second, and e the change of that lead. The class
changes about where e < -m. With s the root mean square of e over all rows, the share of rows that change is

    (1/n) * sum over rows of Phi(-m / s),        Phi: the normal distribution function.

Some hundred rows tell this share better than a count of the rows that did change, which are a handful; the larger of
both counts.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from onnx import ModelProto

from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.sessions import Array, open_session

__all__ = ["LARGEST_CHANGE", "LARGEST_ERROR", "Cost", "Costs", "changed_choices"]

LARGEST_ERROR: Final = 0.05
LARGEST_CHANGE: Final = 0.02
_SCORES_DIMS: Final = 2
_FEWEST_ROWS: Final = 50  # fewer cannot tell a change of 2 %


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """Of a graph, against the float32 one.

    Attributes:
        error: The largest difference of an output: its root mean square relative to that output's spread.
        changed: The share of rows for which another class is chosen; 0 where no output is scores of classes.
    """

    error: float
    changed: float

    @property
    def is_allowed(self) -> bool:
        """Whether int8 may cost that much."""
        return self.error <= LARGEST_ERROR and self.changed <= LARGEST_CHANGE

    def __str__(self) -> str:
        text = f"outputs by {self.error:.1%} of their spread"
        return text + (f" and the class of {self.changed:.1%} of rows" if self.changed else "")


class Costs:
    """Costs of graphs against a float32 graph on the same calls."""

    def __init__(self, plain: ModelProto, calls: Sequence[ExampleCall], *, rows: int) -> None:
        """Run the float32 graph on the first calls that have so many rows together."""
        self._calls = _first(calls, rows)
        self._expected = self._outputs(plain)

    def of(self, graph: ModelProto) -> Cost:
        """What this graph costs."""
        pairs = list(zip(self._expected, self._outputs(graph), strict=True))
        error = max((_relative(left, right) for left, right in pairs), default=0.0)
        return Cost(error, max((changed_choices(left, right) for left, right in pairs), default=0.0))

    def _outputs(self, graph: ModelProto) -> list[list[Array]]:
        """Of each output of floats, the results of all calls."""
        session = open_session(graph.SerializeToString())
        runs = [session.run(call) for call in self._calls]
        floats = [index for index, array in enumerate(runs[0]) if np.issubdtype(array.dtype, np.floating)]
        return [[run[index].astype(np.float64) for run in runs] for index in floats]


def changed_choices(expected: Sequence[Array], got: Sequence[Array]) -> float:
    """The share of rows for which another class is chosen.

    It is 0 for arrays that are no scores, [rows, classes], and for too few rows to tell.

    Args:
        expected: Scores of each call, one for at least two classes.
        got: The same with the change.
    """
    if not all(array.ndim == _SCORES_DIMS and array.shape[1] > 1 for array in expected):
        return 0.0
    before, after = np.concatenate(expected), np.concatenate(got)
    if len(before) < _FEWEST_ROWS:
        return 0.0
    best, second = np.argsort(-before, axis=1)[:, :2].T
    rows = np.arange(len(before))
    lead = before[rows, best] - before[rows, second]
    change = after[rows, best] - after[rows, second] - lead
    spread = float(np.sqrt(np.mean(change**2)))
    if spread == 0.0:
        return 0.0
    likely = float(torch.special.ndtr(torch.from_numpy(-lead / spread)).mean())
    return max(likely, float(np.mean(after.argmax(axis=1) != best)))


def _relative(expected: Sequence[Array], got: Sequence[Array]) -> float:
    before, after = (np.concatenate([array.ravel() for array in arrays]) for arrays in (expected, got))
    spread = float(before.std()) or float(np.abs(before).max(initial=0.0))
    difference = float(np.sqrt(np.mean((before - after) ** 2))) if before.size else 0.0
    return difference / spread if spread else difference


def _first(calls: Sequence[ExampleCall], wanted: int) -> list[ExampleCall]:
    """The first calls, of so many rows together."""
    rows = 0
    found: list[ExampleCall] = []
    for call in calls:
        first = call.tensors()[0]
        rows += first.shape[0] if first.dim() else 1
        found.append(call)
        if rows >= wanted:
            break
    return found
