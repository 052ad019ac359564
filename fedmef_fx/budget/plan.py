"""Memory budgets: what they are written as, what was chosen for them, and in which order accuracy is given up."""

import dataclasses
import heapq
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from fedmef_fx.errors import ConfigError

__all__ = ["LayerChoice", "LayerLevels", "MemoryPlan", "fewest_moves", "moves", "parse_bytes", "shown_bytes"]

_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: object, *, name: str = "memory_budget") -> int:
    """A number of bytes from a number or text.

    Args:
        value: Bytes, or text such as "64MB" (millions of bytes), "1.5GiB" (1024^3 bytes), "500 kB".
        name: What it is, for the message.

    Raises:
        ConfigError: Anything else, or less than one byte.

    Example:
        >>> parse_bytes("64MB"), parse_bytes("1.5GiB"), parse_bytes(1000)
        (64000000, 1610612736, 1000)
    """
    count: float = -1.0
    if isinstance(value, int) and not isinstance(value, bool):
        count = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)) and match[2].lower() in _UNITS:
        count = float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= count < math.inf:
        raise ConfigError(f'{name}: got {value!r}; expected bytes >= 1, or text such as "64MB", "1.5GiB" or "500kB"')
    return int(count)


def shown_bytes(count: int) -> str:
    """A number of bytes for people: 1.23 MB."""
    return f"{count / 1e6:.4g} MB" if count >= 1e5 else f"{count:,d} B"


@dataclasses.dataclass(frozen=True, slots=True)
class LayerLevels:
    """What may be dropped of one layer's input, from nothing to most.

    Attributes:
        layer: The layer that reads it first.
        gammas: Shares that are dropped, ascending, 0 first.
        nbytes: Bytes that are kept, at each.
        errors: Square of the error of the weight gradients that are computed from it, at each.
    """

    layer: str
    gammas: tuple[float, ...]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]


def moves(layers: Sequence[LayerLevels]) -> list[int]:
    """Steps to a higher level, as indices of layers, in the order of most bytes saved per error added.

    A layer's steps stay in their order; its next one is looked at when the one before it has been taken. A step that
    saves nothing comes last.
    """
    queue: list[tuple[float, int, int]] = []

    def offer(index: int, level: int) -> None:
        layer = layers[index]
        if level + 1 < len(layer.gammas):
            saved = layer.nbytes[level] - layer.nbytes[level + 1]
            added = max(layer.errors[level + 1] - layer.errors[level], 0.0)
            price = math.inf if saved <= 0 else added / saved
            heapq.heappush(queue, (price, index, level + 1))

    for index in range(len(layers)):
        offer(index, 0)
    order = []
    while queue:
        _, index, level = heapq.heappop(queue)
        order.append(index)
        offer(index, level)
    return order


def fewest_moves(layers: Sequence[LayerLevels], peak: Callable[[list[float]], int], budget: int) -> list[float]:
    """The gammas after the fewest moves that hold a budget.

    The peak is close to linear in the bytes that are kept, except where its moment changes: interpolation finds the
    place in two or three predictions, and every third trial halves the rest, so that there are never many.

    Args:
        layers: What may be dropped.
        peak: Bytes that a step takes with some gammas. Above the budget with none, within it with the last ones.
        budget: Bytes that it may take.
    """
    steps = list(_after_moves(layers))
    nbytes = [sum(layer.nbytes[k] for layer, k in zip(layers, levels, strict=True)) for levels in steps]

    def after(count: int) -> list[float]:
        return [layer.gammas[k] for layer, k in zip(layers, steps[count], strict=True)]

    low, high = 0, len(steps) - 1
    above, within = peak(after(low)), peak(after(high))
    trials = 0
    while high - low > 1:
        middle = (low + high) // 2
        if trials % 3 < 2:
            share = (budget - within) / max(above - within, 1)
            wanted = nbytes[high] + share * (nbytes[low] - nbytes[high])
            middle = next((count for count in range(low + 1, high) if nbytes[count] <= wanted), high - 1)
        trials += 1
        found = peak(after(middle))
        if found <= budget:
            high, within = middle, found
        else:
            low, above = middle, found
    return after(high)


def _after_moves(layers: Sequence[LayerLevels]) -> Iterator[list[int]]:
    """The level of each layer before the first move and after each."""
    levels = [0] * len(layers)
    yield list(levels)
    for index in moves(layers):
        levels[index] += 1
        yield list(levels)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerChoice:
    """What was chosen for one packed input.

    Attributes:
        layer: The layer that reads it first.
        gamma: Share that is dropped.
        nbytes: Bytes that are kept of it, for one part of the batch.
    """

    layer: str
    gamma: float
    nbytes: int


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
        span = f"{min(gammas):g} to {max(gammas):g}" if gammas else "nothing is packed"
        return [
            ("budget", shown_bytes(self.budget)),
            ("predicted peak", shown_bytes(self.predicted_peak)),
            ("optimizer", self.optimizer),
            ("micro-batch", "whole batch" if self.micro_batch is None else f"{self.micro_batch} of {self.batch}"),
            *((name, str(value)) for name, value in self.settings.items()),
            ("gamma", span),
            ("gradient error", f"{self.gradient_error:.2g}"),
        ]

    def __str__(self) -> str:
        lines = [f"{label:16s}{text}" for label, text in self.rows()]
        width = max((len(layer.layer) for layer in self.layers), default=5)
        table = [f"{layer.layer:{width}s}  {layer.gamma:<5g}  {layer.nbytes:>12,d} bytes" for layer in self.layers]
        head = [f"{'layer':{width}s}  gamma          kept"] if table else []
        return "\n".join([*lines, *(f"because: {reason}" for reason in self.reasons), *head, *table])
