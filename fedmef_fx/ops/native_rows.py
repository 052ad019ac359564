"""The equations of `ops/nsconv.py` on packed rows, in C: one loop each in place of a dozen small tensors.

For `SegmentRows` of float32 and float64 on the CPU, where the native kernels are what packs. Sums run in float64.
"""

import torch
from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.ops.rows import SegmentRows
from fedmef_fx.packing.backend_native import FORMATS

__all__ = ["gradients", "scaled_values", "statistics"]


def statistics(
    values: Tensor, segments: SegmentRows, gain: Tensor, *, limits: tuple[float, float, float], fan_in: int | None
) -> Tensor:
    """The columns of `nsconv.standardize`, `[5, rows]` in the order of `nsconv.Columns`.

    Args:
        values: [active].
        segments: Its rows.
        gain: [rows].
        limits: g, EPS and the square of DEGENERATE.
        fan_in: Weights per row for statistics over all of them; None for the active ones.

    Raises:
        ValueError: As many values as active weights are needed, and as many gains as rows.
    """
    lengths = segments.lengths
    values, rows = _checked(values, segments), lengths.numel()
    if gain.numel() != rows:
        raise ValueError(f"standardise: got {gain.numel()} gains; expected one per row, that is {rows}")
    columns, gains = values.new_empty(5, rows), gain.to(values.dtype).contiguous()
    call(
        "row_statistics",
        FORMATS[values.dtype],
        values,
        lengths,
        gains,
        *limits,
        fan_in or 0,
        columns,
        rows,
        threads_for(values.numel()),
    )
    return columns


def scaled_values(values: Tensor, segments: SegmentRows, columns: Tensor) -> Tensor:
    """(w - mean_i) * scale_i of each active weight, [active]; arguments as in `gradients`."""
    lengths = segments.lengths
    values, rows = _checked(values, segments, columns), lengths.numel()
    out = torch.empty_like(values)
    call("row_scale", FORMATS[values.dtype], values, lengths, columns, out, rows, threads_for(values.numel()))
    return out


def gradients(
    values: Tensor, grad: Tensor, segments: SegmentRows, columns: Tensor, *, g: float
) -> tuple[Tensor, Tensor]:
    """`nsconv.standardize_backward`: gradients of the values [active] and of gain [rows].

    Args:
        values: [active].
        grad: Gradient of w_hat, [active].
        segments: Its rows.
        columns: From `statistics`.
        g: Gain of the nonlinearity that follows.

    Raises:
        ValueError: The arguments do not belong together.
    """
    lengths = segments.lengths
    values, grad, rows = _checked(values, segments, columns), _checked(grad, segments), lengths.numel()
    if grad.dtype != values.dtype:
        raise ValueError(f"standardise: got gradients of {grad.dtype}; expected {values.dtype}")
    out, out_gain = torch.empty_like(values), values.new_empty(rows)
    call(
        "row_gradients",
        FORMATS[values.dtype],
        values,
        grad,
        lengths,
        columns,
        g,
        out,
        out_gain,
        rows,
        threads_for(values.numel()),
    )
    return out, out_gain


def _checked(values: Tensor, segments: SegmentRows, columns: Tensor | None = None) -> Tensor:
    """The values in one run of memory; the kernels would read beyond what does not belong together.

    Raises:
        ValueError: As many values as active weights, and five columns of all rows, are needed.
    """
    counted, rows = segments.total, segments.lengths.numel()
    if counted != values.numel():
        raise ValueError(f"standardise: got {values.numel()} values; expected one per active weight, that is {counted}")
    if columns is not None and (columns.shape != (5, rows) or columns.dtype != values.dtype):
        raise ValueError(
            f"standardise: got columns {columns.dtype}{list(columns.shape)}; expected {values.dtype}{[5, rows]}"
        )
    return values.detach().contiguous()
