"""Gradients at a few coordinates of a parameter: what a client uploads for growth, and how a server averages it."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError

__all__ = ["SparseGradient", "average_sparse_gradients"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SparseGradient:
    """Gradient values at some positions of a parameter; it counts as 0 everywhere else.

    Attributes:
        positions: Flat (row-major) positions, int64 `[k]`, strictly ascending, each in [0, numel).
        values: Gradient values, floating point `[k]`, finite, on the device of the positions.
        numel: Number of weights of the parameter.

    Raises:
        ConfigError: Positions and values that break one of these rules; the message names the rule.

    Example:
        >>> SparseGradient(torch.tensor([1, 4]), torch.tensor([0.5, -2.0]), 6).numel
        6
    """

    positions: Tensor
    values: Tensor
    numel: int

    def __post_init__(self) -> None:
        positions, values = self.positions, self.values
        if positions.dtype != torch.int64 or positions.dim() != 1:
            self._reject(f"positions of {positions.dtype}{list(positions.shape)}", "int64 of shape [k]")
        if not values.is_floating_point() or values.shape != positions.shape:
            self._reject(f"values of {values.dtype}{list(values.shape)}", f"floating point of {list(positions.shape)}")
        if values.device != positions.device:
            self._reject(f"values on {values.device}", f"the device of the positions, {positions.device}")
        if positions.numel() == 0:
            return
        if not bool((positions[1:] > positions[:-1]).all()):
            self._reject("positions that repeat or are out of order", "strictly ascending positions")
        if int(positions[0]) < 0 or int(positions[-1]) >= self.numel:
            self._reject(f"positions {int(positions[0])} to {int(positions[-1])}", f"positions in [0, {self.numel})")
        if not bool(values.isfinite().all()):
            self._reject("infinite values or values that are not a number", "finite values")

    def _reject(self, got: str, expected: str) -> None:
        raise ConfigError(f"SparseGradient: got {got}; expected {expected}")


def average_sparse_gradients(gradients: Sequence[tuple[SparseGradient, float]]) -> SparseGradient:
    """Weighted average of the sparse gradients of one parameter; a coordinate that a client left out counts as 0.

        averaged[i] = sum_c weight_c * gradient_c[i] / sum_c weight_c

    Contributions are sorted before they are added, in float64, so the result does not depend on the order of clients,
    to the last bit.

    Args:
        gradients: Pairs of a client's gradient and its weight (> 0), e.g. its number of samples.

    Returns:
        The average at every coordinate that any client sent, on the CPU; float64 if all values were, else float32.

    Raises:
        ConfigError: No gradients, different sizes, or a weight that is not a positive finite number.
    """
    if not gradients:
        raise ConfigError("average_sparse_gradients: got no gradients; expected at least one client's")
    numel = gradients[0][0].numel
    for gradient, weight in gradients:
        if gradient.numel != numel:
            raise ConfigError(
                f"average_sparse_gradients: got gradients of parameters of {numel} and {gradient.numel} weights; "
                "expected gradients of one parameter"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"average_sparse_gradients: got weight {weight!r}; expected a finite number > 0")
    total = math.fsum(weight for _, weight in gradients)
    positions = torch.cat([gradient.positions.cpu() for gradient, _ in gradients])
    terms = torch.cat([gradient.values.cpu().double() * weight for gradient, weight in gradients])
    # Two stable sorts order the terms by position and, within a position, by value: the same for every client order.
    by_value = terms.argsort(stable=True)
    order = by_value[positions[by_value].argsort(stable=True)]
    unique, index = torch.unique_consecutive(positions[order], return_inverse=True)
    sums = torch.zeros(unique.numel(), dtype=torch.float64).index_add_(0, index, terms[order])
    exact = all(gradient.values.dtype == torch.float64 for gradient, _ in gradients)
    return SparseGradient(unique, (sums / total).to(torch.float64 if exact else torch.float32), numel)
