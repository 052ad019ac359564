"""The equations of `ops/nsconv.py` on packed rows, compiled by numba: one loop each in place of a dozen small tensors.

For `SegmentRows` of float32 and float64 on the CPU, where numba is what packs (`memory.backends`). Sums run in float64.
Importing this module imports numba.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.packing.backend_numba import compiled

__all__ = ["gradients", "scaled_values", "statistics"]

Floats = NDArray[np.floating[Any]]
Lengths = NDArray[np.int64]


@compiled(reassociate=True)
def _statistics(
    values: Floats, lengths: Lengths, gain: Floats, limits: tuple[float, float, float], fan_in: float, columns: Floats
) -> None:
    """The five columns; a `fan_in` of 0 stands for statistics over the active weights."""
    g, eps, degenerate_ratio = limits
    start = 0
    for row in range(lengths.size):
        number = lengths[row]
        total = 0.0
        energy = 0.0
        for k in range(start, start + number):
            value = np.float64(values[k])
            total += value
            energy += value * value
        counted = fan_in if fan_in else max(np.float64(number), 1.0)
        mean = total / counted
        is_degenerate = number <= 1 or energy - counted * mean * mean <= degenerate_ratio * energy
        if is_degenerate:
            mean = 0.0
        square = 0.0
        for k in range(start, start + number):
            value = np.float64(values[k]) - mean
            square += value * value
        if fan_in:
            square += (fan_in - number) * mean * mean
        normalizer = 1.0 / np.sqrt(eps if square < eps else square)  # a NaN stays one
        columns[0, row] = mean
        columns[1, row] = g * gain[row] * normalizer
        columns[2, row] = normalizer
        columns[3, row] = normalizer * normalizer if square > eps else 0.0
        columns[4, row] = 0.0 if is_degenerate else 1.0 / counted
        start += number


@compiled(reassociate=True)
def _scale(values: Floats, lengths: Lengths, mean: Floats, scale: Floats, out: Floats) -> None:
    start = 0
    for row in range(lengths.size):
        for k in range(start, start + lengths[row]):
            out[k] = (values[k] - mean[row]) * scale[row]
        start += lengths[row]


@compiled(reassociate=True)
def _gradients(
    values: Floats, grad: Floats, lengths: Lengths, columns: Floats, g: float, out: Floats, out_gain: Floats
) -> None:
    start = 0
    for row in range(lengths.size):
        stop = start + lengths[row]
        mean, scale = columns[0, row], columns[1, row]
        total = 0.0
        inner = 0.0
        for k in range(start, stop):
            total += np.float64(grad[k])
            inner += np.float64(grad[k]) * np.float64(values[k] - mean)
        shift = total * columns[4, row]
        slope = inner * columns[3, row]
        for k in range(start, stop):
            out[k] = (grad[k] - shift - (values[k] - mean) * slope) * scale
        out_gain[row] = inner * columns[2, row] * g
        start = stop


def statistics(
    values: Tensor, lengths: Tensor, gain: Tensor, *, limits: tuple[float, float, float], fan_in: int | None
) -> Tensor:
    """The columns of `nsconv.standardize`, `[5, rows]` in the order of `nsconv.Columns`.

    Args:
        values: [active].
        lengths: Active weights per row, int64 [rows].
        gain: [rows].
        limits: g, EPS and the square of DEGENERATE.
        fan_in: Weights per row for statistics over all of them; None for the active ones.

    Raises:
        ValueError: As many values as active weights are needed.
    """
    counted = int(lengths.numpy().sum())
    if counted != values.numel():  # the kernels would read beyond them
        raise ValueError(f"standardise: got {values.numel()} values; expected one per active weight, that is {counted}")
    columns = values.new_empty(5, lengths.numel())
    given = gain.to(values.dtype).contiguous().numpy()
    _statistics(values.numpy(), lengths.numpy(), given, limits, float(fan_in or 0), columns.numpy())
    return columns


def scaled_values(values: Tensor, lengths: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(w - mean_i) * scale_i of each active weight, [active]."""
    out = torch.empty_like(values)
    _scale(values.numpy(), lengths.numpy(), mean.numpy(), scale.numpy(), out.numpy())
    return out


def gradients(values: Tensor, grad: Tensor, lengths: Tensor, columns: Tensor, *, g: float) -> tuple[Tensor, Tensor]:
    """`nsconv.standardize_backward`: gradients of the values [active] and of gain [rows].

    Args:
        values: [active].
        grad: Gradient of w_hat, [active].
        lengths: Active weights per row.
        columns: From `statistics`.
        g: Gain of the nonlinearity that follows.
    """
    out, out_gain = torch.empty_like(values), values.new_empty(lengths.numel())
    _gradients(values.numpy(), grad.numpy(), lengths.numpy(), columns.numpy(), g, out.numpy(), out_gain.numpy())
    return out, out_gain
