"""What would take most off the peak of a training step, as one sentence: packed weights, or coded activations."""

from collections.abc import Mapping
from typing import Final

from fedmef_fx.config import Config
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.inspection.page.timeline import Timeline
from fedmef_fx.inspection.table import Table

__all__ = ["memory_hint"]

_PER_WEIGHT: Final = ("weights", "gradients", "optimizer")
_BITS: Final = 8
_CODED_SHARE: Final = 0.1
"""About what 2-bit codes and a bitmap leave of saved activations in float32."""
_WORTH_SAYING: Final = 0.05


def memory_hint(timeline: Timeline, table: Table, config: Config | None) -> str | None:
    """The option that would help most, and how much; None where none would help much.

    Args:
        timeline: Of a training step.
        table: The layers.
        config: What the model was transformed with; None for a model that is not transformed.
    """
    peak = timeline.peak
    total = sum(peak.values())
    if not total or not table.rows:
        return None
    options = {
        "weight_storage": _unpacked(peak, table, config),
        "activations": _uncoded(peak, config),
    }
    best = max(options, key=lambda name: options[name])
    if options[best] < _WORTH_SAYING * total:
        return None
    less = f"about {shown_bytes(options[best])} of {shown_bytes(total)} less at the peak"
    if best == "weight_storage":
        return f'Packed weights would help most: Config(weight_storage="packed") stores active weights only, {less}.'
    return f"Coded activations would help most: Config(activation_bits=2) keeps 2 bits an element, {less}."


def _unpacked(peak: Mapping[str, int], table: Table, config: Config | None) -> float:
    """Bytes that inactive weights, their gradients and their optimizer state take at the peak."""
    if config is None or config.weight_storage == "packed":
        return 0.0
    masked = [row for row in table.rows if row.tier is not None]
    weights = sum(row.weights for row in masked)
    inactive = sum(row.weights - row.active for row in masked)
    every = max(sum(row.weights for row in table.rows), 1)
    per_weight = sum(peak.get(name, 0) for name in _PER_WEIGHT) / every
    return max(inactive * per_weight - weights / _BITS, 0.0)


def _uncoded(peak: Mapping[str, int], config: Config | None) -> float:
    """Bytes that saved activations take beyond those of a 2-bit code."""
    is_coded = config is not None and (config.activation_bits is not None or config.activation_sparsity > 0)
    return 0.0 if is_coded else peak.get("saved", 0) * (1 - _CODED_SHARE)
