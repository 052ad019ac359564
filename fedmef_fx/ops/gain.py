"""Elementwise nonlinearities as nodes, and the gain that keeps variance through them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["activation_gain"]


def activation_gain(function: Callable[[Tensor], Tensor]) -> float:
    """1 / std(function(z)) for z ~ N(0, 1): what keeps the variance of a signal through a nonlinearity.

    Integrated numerically over [-12, 12]; for ReLU it is sqrt(2 / (1 - 1/pi)) = 1.71286.
    Brock et al. (2021) list 1.71396, which they estimated from samples.

    Args:
        function: Elementwise.
    """
    grid, weight = _normal_grid()
    with torch.no_grad():
        values = function(grid)
    mean = (values * weight).sum()
    # Seven digits: what the integral is good for, and what fits a line of graph text.
    return round(float(((values - mean).square() * weight).sum().rsqrt()), 7)


@functools.cache
def _normal_grid() -> tuple[Tensor, Tensor]:
    grid = torch.linspace(-12.0, 12.0, 48_001, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    return grid, weight / weight.sum()
