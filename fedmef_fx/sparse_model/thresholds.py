"""The thresholds and the noise of packed activations as state.

Without it a resumed training drops other elements at first, and rounds others up.
"""

import json

import torch
from torch import Tensor, nn

from fedmef_fx.errors import CheckpointError
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.sparse_model.transformation import CHILD_NAME

__all__ = ["THRESHOLDS", "set_thresholds", "thresholds", "thresholds_from_json", "thresholds_to_json"]

THRESHOLDS = f"{CHILD_NAME}.thresholds"
"""The entry of a state dictionary."""

_COLUMNS = 5
_WITHOUT_DRAWS = 4  # as written before there was noise
_UNKNOWN = -1.0  # a share; NaN would equal nothing, not even itself


def thresholds(model: nn.Module) -> Tensor:
    """What the estimators of a model know, in the order of its modules.

    Returns:
        float64 `[sites, 5]`: threshold, calls since it was estimated, whether it has drifted, the share last kept (-1
        where nothing was packed yet), and how often noise was drawn.
    """
    states = [site.state for site in _sites(model)]
    rows = [(*known, _UNKNOWN if kept is None else kept, draws) for *known, kept, draws in states]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), _COLUMNS)


def set_thresholds(model: nn.Module, state: object) -> None:
    """Let the estimators of a model go on from what `thresholds` returned.

    Of a model that packs other tensors, which other example inputs may lead to, nothing is taken: its estimators look
    at their tensors when they are first called, as always.
    """
    sites = _sites(model)
    shapes = [(len(sites), columns) for columns in (_COLUMNS, _WITHOUT_DRAWS)]
    if not isinstance(state, Tensor) or state.shape not in shapes:
        return
    for site, (threshold, calls, drifted, kept, *draws) in zip(sites, state.double().tolist(), strict=True):
        drawn = round(draws[0]) if draws else 0
        site.state = threshold, round(calls), drifted > 0, None if kept < 0 else kept, drawn


def thresholds_to_json(model: nn.Module) -> str:
    """`thresholds` as text that gives the same numbers back."""
    return json.dumps(thresholds(model).tolist(), allow_nan=False)


def thresholds_from_json(text: str) -> Tensor:
    """What `thresholds_to_json` wrote, for `set_thresholds`.

    Raises:
        CheckpointError: Anything else.
    """
    try:
        rows = json.loads(text)
        width = _WITHOUT_DRAWS if all(len(row) == _WITHOUT_DRAWS for row in rows) else _COLUMNS
        state = torch.tensor(rows, dtype=torch.float64).view(len(rows), width)
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"load: damaged: the thresholds of activations cannot be read: {error}") from error
    kept, known = state[:, 3], state[:, [column for column in range(width) if column != 3]]
    if not bool((known >= 0).all() & known.isfinite().all()) or bool(
        ((kept < 0) & (kept != _UNKNOWN) | (kept > 1)).any()
    ):
        raise CheckpointError("load: damaged: thresholds of activations; expected numbers >= 0, and shares from 0 to 1")
    return state


def _sites(model: nn.Module) -> list[PackActivation]:
    return [module for module in model.modules() if isinstance(module, PackActivation)]
