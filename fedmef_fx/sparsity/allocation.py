"""How the layers of a model share one budget of active weights.

Layer l has the shape (s_1, ..., s_r) and size_l = s_1 * ... * s_r weights. Its share of the budget is proportional to

    erk      s_1 + ... + s_r    (Erdos-Renyi-Kernel; Evci et al., RigL, ICML 2020): a layer's density is proportional to
                                (out + in + kh + kw) / (out * in * kh * kw), so small layers stay denser;
    uniform  size_l             every layer has the same density.

With weights w_l of that kind the real-valued target of a layer is clip(scale * w_l, 1, size_l): layers that would need
more weights than they have become dense and the others share what is left. `scale` is found exactly, in rational
numbers, so that the targets add up to the budget; largest-remainder rounding then makes them whole.
"""

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

from fedmef_fx.errors import ConfigError

__all__ = ["allocate"]


def allocate(
    shapes: Mapping[str, Sequence[int]], density: float, *, method: Literal["erk", "uniform"]
) -> dict[str, int]:
    """Share round(density * total) active weights between parameters.

    Args:
        shapes: Parameter name -> shape, e.g. `[out, in/groups, kh, kw]` or `[out, in]`; any rank.
        density: Active share of all weights together, in (0, 1].
        method: `"erk"` or `"uniform"`; see the module's docstring.

    Returns:
        Parameter name -> number of active weights, in the order of `shapes`. The numbers add up to
        round(density * total) exactly. Each lies between 1 and the parameter's size; only when the budget is smaller
        than the number of parameters do the parameters with the smallest shares get 0.

    Raises:
        ConfigError: A density outside (0, 1], an unknown method, or a negative dimension.

    Example:
        >>> allocate({"conv": (4, 2, 3, 3), "fc": (10, 16)}, 0.25, method="uniform")
        {'conv': 18, 'fc': 40}
    """
    if not 0 < density <= 1:
        raise ConfigError(f"allocate: density: got {density!r}; expected a number in (0, 1], e.g. 0.1")
    if method not in ("erk", "uniform"):
        raise ConfigError(f"allocate: method: got {method!r}; expected 'erk' | 'uniform'")
    for name, shape in shapes.items():
        if any(size < 0 for size in shape):
            raise ConfigError(f"allocate: {name!r}: got shape {tuple(shape)}; expected no negative dimension")
    sizes = [math.prod(shape) for shape in shapes.values()]
    # A scalar has an empty shape, whose sum would give it no share at all.
    weights = [sum(shape) or 1 for shape in shapes.values()] if method == "erk" else [max(size, 1) for size in sizes]
    budget = round(density * sum(sizes))
    floors = [min(1, size) for size in sizes]
    if sum(floors) > budget:
        floors = [0] * len(sizes)
    targets = _clipped_shares(weights, budget, floors=floors, sizes=sizes)
    return dict(zip(shapes, _round_to_budget(targets, budget), strict=True))


def _clipped_shares(
    weights: Sequence[int], budget: int, *, floors: Sequence[int], sizes: Sequence[int]
) -> list[Fraction]:
    """Targets clip(scale * weight, floor, size) that add up to the budget."""

    def targets(scale: Fraction) -> list[Fraction]:
        return [
            min(max(scale * weight, Fraction(low)), Fraction(high))
            for weight, low, high in zip(weights, floors, sizes, strict=True)
        ]

    def total(scale: Fraction) -> Fraction:
        return sum(targets(scale), Fraction(0))

    # The sum of the targets grows piecewise linearly with the scale and bends only where a layer reaches a bound.
    bends = sorted(
        {Fraction(0)}
        | {Fraction(bound, weight) for bounds in (floors, sizes) for bound, weight in zip(bounds, weights, strict=True)}
    )
    right = bisect_left(bends, Fraction(budget), key=total)
    if right == 0:
        return targets(bends[0])
    below, above = bends[right - 1], bends[right]
    total_below, total_above = total(below), total(above)
    return targets(below + (above - below) * (budget - total_below) / (total_above - total_below))


def _round_to_budget(targets: Sequence[Fraction], budget: int) -> list[int]:
    """Largest-remainder rounding; equal remainders are served in order."""
    counts = [math.floor(target) for target in targets]
    by_remainder = sorted(range(len(targets)), key=lambda index: (counts[index] - targets[index], index))
    for index in itertools.islice(by_remainder, budget - sum(counts)):
        counts[index] += 1
    return counts
