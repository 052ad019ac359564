"""The learning rate of budget-aware extrusion (FedMef, Eq. 3-5).

T is the budget in optimizer steps, s in [0, T) the step, eta_0 the rate at the start of the round, eta_s the rate that
the ordinary schedule gives and theta_low the weights that are about to be pruned:

    p(s)   = (2T - 2s) / (2T - s)                              REX; Chen et al., MLSys 2022
    beta_s = p(s) * (2 * sigmoid(||theta_low||_2) - 1) * eta_0
    mu_s   = max(eta_s, beta_s)

beta_s < eta_0 always, so the floor acts only where eta_s has decayed.
"""

import math

from fedmef_fx.errors import ConfigError

__all__ = ["extrusion_rate", "floored_rate", "rex"]


def rex(step: int, budget: int) -> float:
    """p(s): 1 at step 0, falling to 0 at the end of the budget, slowly at first.

    Args:
        step: s, >= 0. From step `budget` on the result is 0.
        budget: T, in steps, >= 1.

    Raises:
        ConfigError: A negative step, or a budget below 1.

    Example:
        >>> rex(0, 10), rex(5, 10), rex(10, 10)
        (1.0, 0.6666666666666666, 0.0)
    """
    if budget < 1:
        raise ConfigError(f"rex: budget: got {budget!r}; expected an integer >= 1: local epochs x batches")
    if step < 0:
        raise ConfigError(f"rex: step: got {step!r}; expected an integer >= 0")
    if step >= budget:
        return 0.0
    return (2 * budget - 2 * step) / (2 * budget - step)


def extrusion_rate(step: int, *, budget: int, norm: float, initial_rate: float) -> float:
    """beta_s: high while the marked weights still carry something and there is time left to move it.

    Args:
        step: s, >= 0; from step `budget` on the rate is 0.
        budget: T, in steps, >= 1.
        norm: ||theta_low||_2 over all layers at this step (not squared), >= 0.
        initial_rate: eta_0.

    Raises:
        ConfigError: A step or budget out of range, or a negative norm.
    """
    if not norm >= 0:
        raise ConfigError(f"extrusion_rate: norm: got {norm!r}; expected a number >= 0")
    # 2 * sigmoid(x) - 1 = tanh(x / 2), which keeps its precision for small x.
    return rex(step, budget) * math.tanh(norm / 2) * initial_rate


def floored_rate(scheduled_rate: float, *, step: int, budget: int, norm: float, initial_rate: float) -> float:
    """mu_s: the scheduled rate eta_s, but not less than beta_s.

    Args:
        scheduled_rate: eta_s.
        step: s, >= 0; from step `budget` on the result is eta_s.
        budget: T, in steps, >= 1.
        norm: ||theta_low||_2 over all layers at this step, >= 0.
        initial_rate: eta_0.

    Raises:
        ConfigError: A step, budget or norm out of range.
    """
    return max(scheduled_rate, extrusion_rate(step, budget=budget, norm=norm, initial_rate=initial_rate))
