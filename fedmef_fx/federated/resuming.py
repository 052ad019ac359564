"""What may change when a run goes on from a checkpoint, and what may not.

May change: `rounds` (a longer run, or a shorter one that is not over yet), `training.learning_rate`,
`config.gradient_clipping`, `strategy` but for its privacy, and the list of clients at its end, where some may come or
go. Nothing else may.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from fedmef_fx.config import Config
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated.checkpoint import load_checkpoint
from fedmef_fx.federated.history import History
from fedmef_fx.federated.server import Server

__all__ = ["CHANGES", "resume"]

CHANGES: Final = "changes"
"""Where a run's settings list what was changed when it went on."""

_FREE: Final = ("rounds", "training.learning_rate", "config.gradient_clipping", "strategy.")
# Fields of strategies that former checkpoints lack, as they were then.
_LATER_STRATEGY: Final[dict[str, Any]] = {"evaluate_every": 1, "uplink": "exact", "privacy": None}
_FIXED: Final = ("strategy.privacy",)


def resume(
    directory: Path, server: Server, history: History, *, is_exact: bool = False
) -> dict[int, dict[str, Tensor]]:
    """Put server and history where the checkpoint says, if there is one.

    Args:
        directory: Where the checkpoint is.
        server: Of the same model.
        history: Its settings are what is asked for now; changes are noted there.
        is_exact: Whether no change is taken.

    Returns:
        What the strategy keeps of each client.

    Raises:
        CheckpointError: A checkpoint that is damaged, or whose settings differ in what may not change.
    """
    checkpoint = load_checkpoint(directory, server.schema)
    if checkpoint is None:
        return {}
    stored = dict(checkpoint.settings)
    stored["config"] = _with_later_fields(stored.get("config"))
    if isinstance(stored.get("strategy"), dict):
        stored["strategy"] = _LATER_STRATEGY | stored["strategy"]
    finished = len(checkpoint.rounds)
    changes = [*stored.get(CHANGES, [])]
    for field, before, now in _differences(stored, history.settings):
        if is_exact or not _may_change(field, now, finished=finished):
            raise CheckpointError(
                f"{directory}: the checkpoint belongs to another run: {field}: got {now!r:.200}, the checkpoint has "
                f"{before!r:.200}; expected the same settings, another checkpoint_dir, or resume=False to start over"
            )
        changes.append({"round": finished, "field": field, "before": before, "now": now})
    if changes:
        history.settings[CHANGES] = changes
    server.restore(checkpoint.state, changed=checkpoint.changed, known=checkpoint.known, memory=checkpoint.memory)
    history.rounds.extend(checkpoint.rounds)
    history.failures.extend(checkpoint.failures)
    return {client: dict(kept) for client, kept in checkpoint.clients.items()}


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, former and present value of every setting that differs."""
    for key, now in wanted.items():
        if key not in stored and key == "strategy":  # from before there were strategies
            continue
        before = stored.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            for name in sorted(before.keys() | now.keys()):
                if before.get(name) != now.get(name):
                    yield f"{key}.{name}", before.get(name), now.get(name)
        elif key == "client_samples" and isinstance(before, list):
            for index, (old, new) in enumerate(zip(before, now, strict=False)):
                if old != new:
                    yield f"client_samples[{index}]", old, new
            if len(before) != len(now):
                yield "clients", len(before), len(now)
        elif before != now:
            yield key, before, now


def _may_change(field: str, now: Any, *, finished: int) -> bool:
    if field == "rounds":
        return bool(now >= finished)
    return field == "clients" or (field.startswith(_FREE) and field not in _FIXED)


def _with_later_fields(config: object) -> object:
    """A configuration from a checkpoint, with the fields that came after it was written, as it was then."""
    try:
        return json.loads(Config.from_json(json.dumps(config), is_stored=True).to_json())
    except ConfigError:  # no configuration of this version
        return config
