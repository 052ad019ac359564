"""The equations of `ops/nsconv.py` on dense rows, in Triton: one kernel each in place of some twenty launches.

For float32 on CUDA devices. A program takes one row, and reads it in parts. Imported where Triton is there alone
(`fedmef_fx.packing.triton_choice`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gradients", "scaled_values", "statistics"]

_PART = 1024


def statistics(
    values: Tensor, mask: Tensor | None, gain: Tensor, *, limits: tuple[float, float, float], over_all: bool
) -> Tensor:
    """The columns of `nsconv.standardize`, `[5, rows]` in the order of `nsconv.Columns`.

    Args:
        values: [rows, fan_in].
        mask: Boolean, of the same shape; None = all active.
        gain: [rows].
        limits: g, EPS and the square of DEGENERATE.
        over_all: Whether statistics are over masked weights, too.
    """
    columns = values.new_empty(5, values.shape[0])
    gains = gain.detach().to(values.dtype).contiguous()
    _launch(_statistics, values, mask, gains, columns, *limits, IS_OVER_ALL=over_all)
    return columns


def scaled_values(values: Tensor, mask: Tensor | None, columns: Tensor) -> Tensor:
    """(w - mean_i) * scale_i of each active weight, 0 elsewhere, [rows, fan_in]; arguments as in `gradients`."""
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    _launch(_scale, values, mask, columns, out)
    return out


def gradients(values: Tensor, mask: Tensor | None, grad: Tensor, columns: Tensor, *, g: float) -> tuple[Tensor, Tensor]:
    """`nsconv.standardize_backward`: gradients of the values [rows, fan_in] and of gain [rows].

    Args:
        values: [rows, fan_in].
        mask: Boolean, of the same shape; None = all active.
        grad: Gradient of w_hat, [rows, fan_in].
        columns: From `statistics`.
        g: Gain of the nonlinearity that follows.
    """
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    out_gain = values.new_empty(values.shape[0])
    _launch(_gradients, values, mask, grad.detach().contiguous(), columns, out, out_gain, g)
    return out, out_gain


def _launch(kernel, values: Tensor, mask: Tensor | None, *arguments, **constants) -> None:
    rows, fan_in = values.shape
    if not rows:
        return
    values = values.detach().contiguous()
    bytes_of_mask = values if mask is None else mask.contiguous().view(torch.uint8)
    part = min(triton.next_power_of_2(max(fan_in, 16)), _PART)
    with torch.cuda.device_of(values):
        kernel[(rows,)](
            values, bytes_of_mask, rows, fan_in, *arguments,
            HAS_MASK=mask is not None, PART=part, num_warps=4, **constants,
        )  # fmt: skip


@triton.jit
def _load(values, mask, row, fan_in, first, HAS_MASK: tl.constexpr, PART: tl.constexpr):
    """Where a part of a row lies, its active weights, 0 elsewhere, and which these are."""
    column = first + tl.arange(0, PART)
    at = row * fan_in + column
    is_active = column < fan_in
    if HAS_MASK:
        is_active = is_active & (tl.load(mask + at, mask=is_active, other=0) != 0)
    return at, tl.load(values + at, mask=is_active, other=0.0), is_active


@triton.jit(do_not_specialize=["g", "eps", "degenerate"])
def _statistics(
    values, mask, rows, fan_in, gain, columns, g, eps, degenerate,
    HAS_MASK: tl.constexpr, PART: tl.constexpr, IS_OVER_ALL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total, energy, number = tl.zeros((PART,), tl.float32), tl.zeros((PART,), tl.float32), tl.zeros((PART,), tl.float32)
    for first in range(0, fan_in, PART):
        _, x, is_active = _load(values, mask, row, fan_in, first, HAS_MASK, PART)
        total += x
        energy += x * x
        number += is_active.to(tl.float32)
    count, sum_of_squares = tl.sum(number, axis=0), tl.sum(energy, axis=0)
    counted = fan_in.to(tl.float32) if IS_OVER_ALL else tl.maximum(count, 1.0)
    mean = tl.div_rn(tl.sum(total, axis=0), counted)
    is_degenerate = (count <= 1.0) | (sum_of_squares - counted * mean * mean <= degenerate * sum_of_squares)
    mean = tl.where(is_degenerate, 0.0, mean)
    # Summed again over the centred values: the difference above cancels when the mean dominates.
    squares = tl.zeros((PART,), tl.float32)
    for first in range(0, fan_in, PART):
        _, x, is_active = _load(values, mask, row, fan_in, first, HAS_MASK, PART)
        centred = tl.where(is_active, x - mean, 0.0)
        squares += centred * centred
    square = tl.sum(squares, axis=0)
    if IS_OVER_ALL:
        square += (counted - count) * mean * mean
    normalizer = tl.div_rn(1.0, tl.sqrt_rn(tl.maximum(square, eps)))
    tl.store(columns + row, mean)
    tl.store(columns + rows + row, g * tl.load(gain + row) * normalizer)
    tl.store(columns + 2 * rows + row, normalizer)
    tl.store(columns + 3 * rows + row, tl.where(square > eps, normalizer * normalizer, 0.0))
    tl.store(columns + 4 * rows + row, tl.where(is_degenerate, 0.0, tl.div_rn(1.0, counted)))


@triton.jit
def _scale(values, mask, rows, fan_in, columns, out, HAS_MASK: tl.constexpr, PART: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    mean, scale = tl.load(columns + row), tl.load(columns + rows + row)
    for first in range(0, fan_in, PART):
        at, x, is_active = _load(values, mask, row, fan_in, first, HAS_MASK, PART)
        column = first + tl.arange(0, PART)
        tl.store(out + at, tl.where(is_active, (x - mean) * scale, 0.0), mask=column < fan_in)


@triton.jit(do_not_specialize=["g"])
def _gradients(
    values, mask, rows, fan_in, grad, columns, out, out_gain, g,
    HAS_MASK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    mean, scale = tl.load(columns + row), tl.load(columns + rows + row)
    normalizer, inverse_square = tl.load(columns + 2 * rows + row), tl.load(columns + 3 * rows + row)
    centring = tl.load(columns + 4 * rows + row)
    sums, products = tl.zeros((PART,), tl.float32), tl.zeros((PART,), tl.float32)
    for first in range(0, fan_in, PART):
        at, x, is_active = _load(values, mask, row, fan_in, first, HAS_MASK, PART)
        h = tl.load(grad + at, mask=is_active, other=0.0)
        sums += h
        products += h * (x - mean)
    inner = tl.sum(products, axis=0)
    shift, pull = tl.sum(sums, axis=0) * centring, inner * inverse_square
    for first in range(0, fan_in, PART):
        at, x, is_active = _load(values, mask, row, fan_in, first, HAS_MASK, PART)
        column = first + tl.arange(0, PART)
        h = tl.load(grad + at, mask=is_active, other=0.0)
        result = (h - shift - (x - mean) * pull) * scale
        tl.store(out + at, tl.where(is_active, result, 0.0), mask=column < fan_in)
    tl.store(out_gain + row, inner * normalizer * g)
