"""What a memory budget led to: a choice per layer and the plan as a whole."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.packing.bit_planes import Bits

__all__ = ["LayerChoice", "Level", "MemoryPlan"]


class Level(NamedTuple):
    """How little is kept of one layer's input.

    Attributes:
        gamma: Share that is dropped.
        bits: Bits of the code for what is kept; None for values.
    """

    gamma: float = 0.0
    bits: Bits | None = None

    def __str__(self) -> str:
        return f"gamma {self.gamma:g}" + ("" if self.bits is None else f", {self.bits} bits")


@dataclasses.dataclass(frozen=True, slots=True)
class LayerChoice:
    """What was chosen for one packed input.

    Attributes:
        layer: The layer that reads it first.
        gamma: Share that is dropped.
        nbytes: Bytes that are kept of it, for one part of the batch.
        bits: Bits of the code for what is kept; None for values.
    """

    layer: str
    gamma: float
    nbytes: int
    bits: Bits | None = None

    @property
    def level(self) -> Level:
        """Gamma and bits."""
        return Level(self.gamma, self.bits)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a budget is kept.

    Attributes:
        budget: Bytes that a training step may take.
        predicted_peak: Bytes that it will take.
        optimizer: The optimizer that was counted with.
        batch: Samples in the example inputs.
        micro_batch: Samples per part, None for the whole batch at once: use `fedmef_fx.training.micro_batches`.
        settings: Fields of the configuration that were changed.
        layers: The share that is dropped of each packed input.
        gradient_error: Relative error of the weight gradients on the example inputs, against exact ones.
        reasons: What was tried, in order, and what came of it.
        seconds: Time that planning took.
    """

    budget: int
    predicted_peak: int
    optimizer: str
    batch: int | None
    micro_batch: int | None
    settings: Mapping[str, Any]
    layers: tuple[LayerChoice, ...]
    gradient_error: float
    reasons: tuple[str, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {**dataclasses.asdict(self), "settings": dict(self.settings), "reasons": list(self.reasons)}

    def rows(self) -> list[tuple[str, str]]:
        """What was chosen, as label and text."""
        gammas = [layer.gamma for layer in self.layers]
        bits = sorted({layer.bits for layer in self.layers if layer.bits is not None})
        span = f"{min(gammas):g} to {max(gammas):g}" if gammas else "nothing is packed"
        return [
            ("budget", shown_bytes(self.budget)),
            ("predicted peak", shown_bytes(self.predicted_peak)),
            ("optimizer", self.optimizer),
            ("micro-batch", "whole batch" if self.micro_batch is None else f"{self.micro_batch} of {self.batch}"),
            *((name, str(value)) for name, value in self.settings.items()),
            ("gamma", span),
            *([("bits", ", ".join(map(str, bits)))] if bits else []),
            ("gradient error", f"{self.gradient_error:.2g}"),
        ]

    def __str__(self) -> str:
        lines = [f"{label:16s}{text}" for label, text in self.rows()]
        width = max((len(layer.layer) for layer in self.layers), default=5)
        table = [
            f"{layer.layer:{width}s}  {layer.gamma:<5g}  {layer.bits or '-':<4}  {layer.nbytes:>12,d} bytes"
            for layer in self.layers
        ]
        head = [f"{'layer':{width}s}  gamma  bits          kept"] if table else []
        return "\n".join([*lines, *(f"because: {reason}" for reason in self.reasons), *head, *table])
