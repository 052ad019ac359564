"""Memory budgets: what they are written as, what was chosen for them, and in which order accuracy is given up."""

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence

from fedmef_fx.records.memory_plan import Level

__all__ = ["LayerLevels", "fewest_moves", "moves"]


@dataclasses.dataclass(frozen=True, slots=True)
class LayerLevels:
    """How little may be kept of one layer's input, from everything to least.

    Attributes:
        layer: The layer that reads it first.
        levels: What may be kept of it, ascending by error, everything first.
        nbytes: Bytes that are kept, at each.
        errors: Square of the error of the weight gradients that are computed from it, at each.
    """

    layer: str
    levels: tuple[Level, ...]
    nbytes: tuple[int, ...]
    errors: tuple[float, ...]


def moves(layers: Sequence[LayerLevels]) -> list[int]:
    """Steps to a higher level, as indices of layers, in the order of most bytes saved per error added.

    A layer's steps stay in their order; its next one is looked at when the one before it has been taken. A step that
    saves nothing comes last.
    """
    queue: list[tuple[float, int, int]] = []

    def add_candidate(index: int, level: int) -> None:
        layer = layers[index]
        if level + 1 < len(layer.levels):
            saved = layer.nbytes[level] - layer.nbytes[level + 1]
            added = max(layer.errors[level + 1] - layer.errors[level], 0.0)
            price = math.inf if saved <= 0 else added / saved
            heapq.heappush(queue, (price, index, level + 1))

    for index in range(len(layers)):
        add_candidate(index, 0)
    order = []
    while queue:
        _, index, level = heapq.heappop(queue)
        order.append(index)
        add_candidate(index, level)
    return order


def fewest_moves(layers: Sequence[LayerLevels], peak: Callable[[list[Level]], int], budget: int) -> list[Level]:
    """The levels after the fewest moves that hold a budget.

    The peak is close to linear in the bytes that are kept, except where its moment changes: interpolation finds the
    place in two or three predictions, and every third trial halves the rest, so that there are never many.

    Args:
        layers: What may be dropped.
        peak: Bytes that a step takes with some levels. Above the budget with none, within it with the last ones.
        budget: Bytes that it may take.
    """
    steps = list(_after_moves(layers))
    nbytes = [sum(layer.nbytes[k] for layer, k in zip(layers, levels, strict=True)) for levels in steps]

    def after(count: int) -> list[Level]:
        return [layer.levels[k] for layer, k in zip(layers, steps[count], strict=True)]

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
        reached = peak(after(middle))
        if reached <= budget:
            high, within = middle, reached
        else:
            low, above = middle, reached
    return after(high)


def _after_moves(layers: Sequence[LayerLevels]) -> Iterator[list[int]]:
    """The level of each layer before the first move and after each."""
    levels = [0] * len(layers)
    yield list(levels)
    for index in moves(layers):
        levels[index] += 1
        yield list(levels)
