"""The thresholds and the noise of packed activations as state.

Without it a resumed training drops other elements at first, and rounds others up. A place that packs is known by the
name of its module, as its number: what a model captured late, for a kind of call that it had not seen before, is not
there yet in the one that goes on from its state. Such states wait until their place is captured.
"""

import json
import zlib

import torch
from torch import Tensor, nn

from fedmef_fx.errors import CheckpointError
from fedmef_fx.ops.noise_site import NoiseSite, SiteState
from fedmef_fx.sparse_model.transformation import CHILD_NAME, Transformation, transformation_of

__all__ = [
    "THRESHOLDS",
    "set_late_thresholds",
    "set_thresholds",
    "thresholds",
    "thresholds_from_json",
    "thresholds_to_json",
]

THRESHOLDS = f"{CHILD_NAME}.thresholds"
"""The entry of a state dictionary."""

_COLUMNS = 6
_FORMER_COLUMNS = (5, 4)  # as written before there were names, and before there was noise
_UNKNOWN = -1.0  # a share; NaN would equal nothing, not even itself


def thresholds(model: nn.Module) -> Tensor:
    """What the estimators of a model know, in the order of its modules; then what waits for its place.

    Returns:
        float64 `[sites, 6]`: threshold, calls since it was estimated, whether it has drifted, the share last kept (-1
        where nothing was packed yet), how often noise was drawn, and the checksum of the name of the place.
    """
    states = {number: site.state for number, site in _sites(model, "").items()}
    rows = [
        (*known, _UNKNOWN if kept is None else kept, draws, number)
        for number, (*known, kept, draws) in (states | transformation_of(model).late_thresholds).items()
    ]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), _COLUMNS)


def set_thresholds(model: nn.Module, state: object) -> None:
    """Let the estimators of a model go on from what `thresholds` returned.

    Places that the model does not have yet get theirs when they are captured. Of a state without names, as former
    versions wrote it, nothing is taken if the model packs another number of tensors: its estimators look at their
    tensors when they are first called, as always.
    """
    sites = _sites(model, "")
    if not isinstance(state, Tensor) or state.ndim != 2 or state.shape[1] not in (_COLUMNS, *_FORMER_COLUMNS):
        return
    rows = state.double().tolist()
    if state.shape[1] in _FORMER_COLUMNS:
        if len(state) != len(sites):
            return
        rows = [[*([*row, 0.0][:5]), number] for row, number in zip(rows, sites, strict=True)]
    states = {round(row[5]): _state_of(row) for row in rows}
    for number in sites.keys() & states.keys():
        sites[number].state = states.pop(number)
    transformation_of(model).late_thresholds = states


def set_late_thresholds(transformation: Transformation, owner: nn.Module, path: str) -> None:
    """Give the places of a module that was captured just now the states that waited for them.

    Args:
        transformation: Of the model.
        owner: The module.
        path: Its name in the model.
    """
    for number, site in _sites(owner, path).items():
        if number in transformation.late_thresholds:
            site.state = transformation.late_thresholds.pop(number)


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
        width = len(rows[0]) if rows and len(rows[0]) in _FORMER_COLUMNS else _COLUMNS
        state = torch.tensor(rows, dtype=torch.float64).view(len(rows), width)
    except (ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"load: damaged: the thresholds of activations cannot be read: {error}") from error
    kept, known = state[:, 3], state[:, [column for column in range(width) if column != 3]]
    if not bool((known >= 0).all() & known.isfinite().all()) or bool(
        ((kept < 0) & (kept != _UNKNOWN) | (kept > 1)).any()
    ):
        raise CheckpointError("load: damaged: thresholds of activations; expected numbers >= 0, and shares from 0 to 1")
    return state


def _state_of(row: list[float]) -> SiteState:
    threshold, calls, drifted, kept, draws, _ = row
    return threshold, round(calls), drifted > 0, None if kept < 0 else kept, round(draws)


def _sites(module: nn.Module, path: str) -> dict[int, NoiseSite]:
    """The places in a module by the checksums of their names in the model, in order."""
    named = ((".".join(filter(None, (path, name))), child) for name, child in module.named_modules())
    sites = ((name, child) for name, child in named if isinstance(child, NoiseSite) and child.is_stateful)
    return {zlib.crc32(name.encode()): child for name, child in sites}
