"""When masks are adjusted, and how many weights of a layer then change places."""

import math

from fedmef_fx.errors import ConfigError

__all__ = ["adjustment_count", "is_adjustment_round"]


def is_adjustment_round(round_index: int, *, interval: int, stop: int) -> bool:
    """Whether masks are adjusted at the end of a round.

    True in the rounds interval, 2 * interval, ... before `stop`. Round 0 is none, as in the authors' code: nothing has
    been learnt yet that magnitudes could tell.

    Args:
        round_index: The round, counted from 0.
        interval: Delta_R, rounds between two adjustments, >= 1.
        stop: R_stop, the round from which masks stay fixed.

    Raises:
        ConfigError: A negative round, or an interval below 1.

    Example:
        >>> [t for t in range(40) if is_adjustment_round(t, interval=10, stop=30)]
        [10, 20]
    """
    if round_index < 0:
        raise ConfigError(f"is_adjustment_round: round_index: got {round_index}; expected an integer >= 0")
    if interval < 1:
        raise ConfigError(f"is_adjustment_round: interval: got {interval}; expected an integer >= 1")
    return 0 < round_index < stop and round_index % interval == 0


def adjustment_count(active: int, inactive: int, *, round_index: int, stop: int, rate: float) -> int:
    """Number of weights that a layer prunes and grows in an adjustment round.

        k_l(t) = min(floor(alpha/2 * (1 + cos(pi * t / R_stop)) * n_l), inactive weights of layer l)

    Args:
        active: n_l, number of active weights of the layer.
        inactive: Number of its other weights.
        round_index: t, counted from 0.
        stop: R_stop; from this round on the count is 0.
        rate: alpha, in (0, 1]: the share of active weights that round 0 would replace.

    Returns:
        k_l(t), between 0 and min(active, inactive).

    Raises:
        ConfigError: A negative count or round, or a rate outside (0, 1].

    Example:
        >>> adjustment_count(100, 900, round_index=50, stop=100, rate=0.4)
        20
    """
    if active < 0 or inactive < 0:
        raise ConfigError(f"adjustment_count: got {active} active and {inactive} inactive; expected integers >= 0")
    if round_index < 0:
        raise ConfigError(f"adjustment_count: round_index: got {round_index}; expected an integer >= 0")
    if not 0 < rate <= 1:
        raise ConfigError(f"adjustment_count: rate: got {rate!r}; expected a number in (0, 1]")
    if round_index >= stop:
        return 0
    exact = rate / 2 * (1 + math.cos(math.pi * round_index / stop)) * active
    # 0.145 * 2 * 100 is 28.999999999999996: rounding noise of the product must not cost a weight.
    return min(math.floor(exact * (1 + 1e-12)), active, inactive)
