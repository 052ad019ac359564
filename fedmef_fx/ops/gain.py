"""Elementwise nonlinearities as nodes, and the gain that keeps variance through them."""

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedmef_fx.graph.program import Region

__all__ = ["ACTIVATION_MODULES", "ACTIVATION_NAMES", "activation_gain", "nonlinearity"]

ACTIVATION_MODULES: Final = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)
_FUNCTIONS: Final[dict[Callable[..., Any] | str, Callable[..., Tensor]]] = {
    F.celu: F.celu,
    F.elu: F.elu,
    F.gelu: F.gelu,
    F.hardsigmoid: F.hardsigmoid,
    F.hardswish: F.hardswish,
    F.hardtanh: F.hardtanh,
    F.leaky_relu: F.leaky_relu,
    F.mish: F.mish,
    F.relu: F.relu,
    F.relu6: F.relu6,
    F.selu: F.selu,
    F.silu: F.silu,
    F.softplus: F.softplus,
    torch.relu: torch.relu,
    torch.sigmoid: torch.sigmoid,
    torch.tanh: torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
ACTIVATION_NAMES: Final = frozenset(f if isinstance(f, str) else f.__name__ for f in _FUNCTIONS)
"""What these functions are called, not in place: `relu`, `gelu`, ..."""


def nonlinearity(region: Region, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The elementwise function a node applies to its first argument, None if it is none that is known.

    The result never works in place, whatever the node does.
    """
    module = region.module(node)
    if type(module) in ACTIVATION_MODULES:
        return lambda z: module(z.clone())  # type: ignore[misc]  # one of ACTIVATION_MODULES
    if node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "input")}
        return lambda z: _FUNCTIONS[node.target](z.clone(), *node.args[1:], **kwargs)
    return None


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
