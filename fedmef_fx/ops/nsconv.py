r"""The NSConv kernel: scaled weight standardisation of a masked kernel (FedMef, Sec. 3.3; Brock et al., NF-Nets 2021).

Per output channel i with N_i active weights (mask m, weights w, learnable gain_i, nonlinearity gain g)

    w_hat = g * gain_i * (w - mean_i) / (std_i * sqrt(N_i))      where m = 1,  0 elsewhere,

so that sum(w_hat_i) = 0 and sum(w_hat_i^2) = (g * gain_i)^2. It is computed as w_hat = c_i * b / sqrt(max(s_i, EPS))
with c_i = g * gain_i, b = m * (w - mean_i), s_i = std_i^2 * N_i:

- statistics "active": mean_i and std_i over the active weights, s_i = sum(b^2);
- statistics "all": over all F weights of the channel, masked ones counting as 0, s_i = sum((m*w - mean_i)^2), N_i = F;
  the mask is applied again after centring.

Guards: N_i = 0 gives a zero kernel. With N_i = 1, or a standard deviation below `DEGENERATE` times the root mean
square, centring would leave nothing: mean_i is taken as 0 there, so that w_hat = c_i * w / sqrt(sum(w^2)), which is
w / (|w| sqrt(N)) for equal weights. EPS bounds the amplification of a kernel that is almost all zeros, such as one
that was just grown, by 1,000. (NF-Nets use 1e-4, which small depthwise kernels reach at initialisation.)
"""

from types import ModuleType
from typing import Any, Final, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.autograd import Function

from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.ops import native_rows
from fedmef_fx.ops.backward import differentiable_once
from fedmef_fx.ops.forward import writable_result
from fedmef_fx.ops.overridable import overridable
from fedmef_fx.ops.rows import DenseRows, Rows, SegmentRows, packed_rows
from fedmef_fx.packing import backend
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.tracers import is_traced, weights_as_constants
from fedmef_fx.packing.triton_choice import triton_module

__all__ = [
    "DEGENERATE",
    "EPS",
    "Columns",
    "KernelForm",
    "Statistics",
    "centred",
    "channel_affine",
    "nsconv_kernel",
    "nsconv_kernel_backward",
    "nsconv_weight",
    "standardize_backward",
    "standardized",
]

EPS = 1e-6
DEGENERATE = 1e-3
_DOMINATED: Final = 1e-2  # of the energy that is left without the mean
_NATIVE_DTYPES: Final = (torch.float32, torch.float64)

Statistics = Literal["active", "all"]


class Columns(NamedTuple):
    """What standardising a kernel comes down to: one number per row (output channel), as columns of `ops.rows`.

    A few kilobytes, from which backward makes the kernel again without taking statistics again.

    Attributes:
        mean: mean_i, 0 in degenerate rows.
        scale: c_i / sqrt(max(s_i, EPS)).
        normalizer: 1 / sqrt(max(s_i, EPS)).
        inverse_square: 1 / s_i, 0 where the guard EPS acts.
        centring: 1 / N_i where the mean is subtracted, 0 in degenerate rows.
    """

    mean: Tensor
    scale: Tensor
    normalizer: Tensor
    inverse_square: Tensor
    centring: Tensor


def _together(columns: Columns) -> Tensor:
    """`[5, rows]`: what they were cut from, where that is all of it."""
    whole, rows = columns.mean._base, columns.mean.numel()
    if whole is None or whole.shape != (len(columns), rows) or not whole.is_contiguous():
        return torch.stack(columns)
    is_all = all(one._base is whole and one.storage_offset() == at * rows for at, one in enumerate(columns))
    return whole if is_all else torch.stack(columns)


def to_rows(weight: Tensor, *, groups: int, transposed: bool) -> Tensor:
    """A kernel as [out, fan_in]: [out, in/groups, *k], or [in, out/groups, *k] of a transposed convolution."""
    if not transposed:
        return weight.reshape(weight.shape[0], -1)
    grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def from_rows(rows: Tensor, shape: torch.Size, *, groups: int, transposed: bool) -> Tensor:
    """The inverse of `to_rows`."""
    if not transposed:
        return rows.reshape(shape)
    grouped = rows.reshape(groups, shape[1], shape[0] // groups, -1)
    return grouped.transpose(1, 2).reshape(shape)


def standardize(values: Tensor, rows: Rows, gain: Tensor, *, g: float, statistics: Statistics) -> Columns:
    """Take the statistics of a kernel.

    Args:
        values: The weights in the form of `rows`.
        rows: How they are stored: dense, [out, fan_in] with a mask, or packed, [active].
        gain: [out].
        g: Gain of the nonlinearity that follows.
        statistics: Over the active weights or over all of them.

    Returns:
        The columns: w_hat = centred(values, rows, columns) * scale.
    """
    if _is_native(rows, values):
        over = rows.fan_in if statistics == "all" else None
        limits = (g, EPS, DEGENERATE**2)
        return Columns(*native_rows.statistics(values, rows, gain, limits=limits, fan_in=over).unbind())
    kernels = _on_gpu(rows, values)
    if kernels is not None:
        limits, over_all = (g, EPS, DEGENERATE**2), statistics == "all"
        found = kernels.statistics(values, _mask_of(rows), gain, limits=limits, over_all=over_all)
        return Columns(*found.unsqueeze(-1).unbind())
    base = rows.active(values)
    number = rows.counts(values)
    counted = torch.full_like(number, rows.fan_in) if statistics == "all" else number.clamp_min(1.0)
    mean = rows.sum(base) / counted
    energy = rows.square_norm(base)
    spread = energy - counted * mean.square()
    if _has(spread < _DOMINATED * energy):
        mean, spread = _precisely(base, rows, mean, counted)
    degenerate = (number <= 1) | (spread <= DEGENERATE**2 * energy)
    mean = mean.masked_fill(degenerate, 0.0)
    base = rows.minus_(base, mean)
    # Summed again over the centred values: the difference above cancels when the mean dominates.
    square = rows.square_norm(base)
    if statistics == "all":
        square = square + (rows.fan_in - number) * mean.square()
    normalizer = square.clamp_min(EPS).rsqrt()
    return Columns(
        mean=mean,
        scale=g * rows.column(gain) * normalizer,
        normalizer=normalizer,
        inverse_square=torch.where(square > EPS, normalizer.square(), 0.0),
        centring=torch.where(degenerate, 0.0, counted.reciprocal()),
    )


def _has(condition: Tensor) -> bool:
    """Whether a condition holds anywhere, where that can be known without waiting for a device."""
    is_known = condition.device.type == "cpu" and not is_traced() and not has_no_values(condition)
    return is_known and bool(condition.any())


def _precisely(base: Tensor, rows: Rows, mean: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, rounded once, and counted times the variance, of rows whose mean may dominate.

    Where the mean is 1,000 times the deviation, so is the effect of its rounding, and energy - counted mean^2 has no
    digit left to tell which rows are degenerate. The kernels in C take both in float64.
    """
    rest = rows.minus_(base.clone(), mean)
    outside = counted - rows.counts(base)  # weights that count as 0
    correction = (rows.sum(rest) - outside * mean) / counted
    better = mean + correction
    rest = rows.minus_(rest, better - mean)
    return better, rows.square_norm(rest) + outside * better.square()


def centred(values: Tensor, rows: Rows, columns: Columns) -> Tensor:
    """The weights without their mean, b of the module docstring; a new tensor in the form of `rows`."""
    return rows.minus_(rows.active(values), columns.mean)


def standardized(values: Tensor, rows: Rows, columns: Columns) -> Tensor:
    """w_hat, in the form of `rows`; a new tensor."""
    if _is_native(rows, values):
        return native_rows.scaled_values(values, rows, _together(columns))
    kernels = _on_gpu(rows, values)
    if kernels is not None:
        scaled: Tensor = kernels.scaled_values(values, _mask_of(rows), torch.stack(columns))
        return scaled
    base, scale = centred(values, rows, columns), rows.spread(columns.scale)
    return base * scale if is_traced() else base.mul_(scale)


def standardize_backward(
    values: Tensor, columns: Columns, rows: Rows, grad: Tensor, *, g: float
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and gain from the gradient of w_hat.

    Since ds/dw = 2 b for both kinds of statistics (the terms of the mean cancel), with h = m * grad

        dL/dw = m * scale * (h - sum(h) / N - b * <h, b> / s),    dL/dgain = g * <h, b> / sqrt(max(s, EPS)),

    without the second term in degenerate rows and without the third where EPS acts.

    Args:
        values: The weights in the form of `rows`.
        columns: From `standardize` on the same weight.
        rows: As there.
        grad: Gradient of w_hat, in the form of `rows`; not changed.
        g: As there.

    Returns:
        The gradients of weight, in the form of `rows`, and gain, [out].
    """
    if _is_native(rows, values) and grad.dtype == values.dtype:
        return native_rows.gradients(values, grad, rows, _together(columns), g=g)
    kernels = _on_gpu(rows, values)
    if kernels is not None and grad.dtype == values.dtype:
        both: tuple[Tensor, Tensor] = kernels.gradients(values, _mask_of(rows), grad, torch.stack(columns), g=g)
        return both
    base = centred(values, rows, columns)
    inner = rows.inner(grad, base)  # b is 0 where masked: no mask on grad needed
    result = rows.active(grad)
    result.sub_(rows.spread(rows.sum(result) * columns.centring))
    result.addcmul_(base, rows.spread(inner * columns.inverse_square), value=-1.0)
    result.mul_(rows.spread(columns.scale))
    rows.clear_(result)
    return result, (inner * columns.normalizer).flatten() * g


def _is_native(rows: Rows, values: Tensor) -> TypeGuard[SegmentRows]:
    """Whether there is a native kernel for such rows and values."""
    is_known = isinstance(rows, SegmentRows) and values.device.type == "cpu" and values.dtype in _NATIVE_DTYPES
    return is_known and backend().name == "native"


def _on_gpu(rows: Rows, values: Tensor) -> ModuleType | None:
    """The kernels for dense rows on a GPU; None where operations of torch do."""
    is_known = isinstance(rows, DenseRows) and values.device.type == "cuda" and values.dtype == torch.float32
    if not is_known or is_traced() or has_no_values(values):
        return None
    return triton_module("fedmef_fx.ops.triton_rows")


def _mask_of(rows: Rows) -> Tensor | None:
    return rows.mask if isinstance(rows, DenseRows) else None


class KernelForm(NamedTuple):
    """How a kernel is standardised.

    Attributes:
        g: Gain of the nonlinearity that follows.
        groups: Groups of the convolution; they only matter when it is transposed.
        transposed: Whether it is a transposed convolution.
        statistics: Mean and deviation over the "active" weights or over "all" of a channel.
    """

    g: float = 1.0
    groups: int = 1
    transposed: bool = False
    statistics: Statistics = "active"

    def rows(self, tensor: Tensor) -> Tensor:
        """A kernel or mask as [out, fan_in]."""
        return to_rows(tensor, groups=self.groups, transposed=self.transposed)

    def kernel(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `rows`."""
        return from_rows(rows, shape, groups=self.groups, transposed=self.transposed)

    def dense_rows(self, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, DenseRows]:
        """A dense kernel as values in rows, and the rows."""
        values = self.rows(weight)
        return values, DenseRows(None if mask is None else self.rows(mask), values.shape[1])

    def packed_rows(self, bitmap: Tensor, shape: torch.Size) -> Rows:
        """The rows of a packed kernel of a dense shape."""
        return packed_rows(bitmap, shape, axis=1 if self.transposed else 0, groups=self.groups)

    def standardize(self, values: Tensor, rows: Rows, gain: Tensor) -> Columns:
        """`standardize` in this form."""
        return standardize(values, rows, gain, g=self.g, statistics=self.statistics)


class _NSConvWeight(Function):
    """`nsconv_weight`; backward makes the kernel again instead of keeping it."""

    @staticmethod
    @writable_result
    def forward(ctx: Any, weight: Tensor, gain: Tensor, mask: Tensor | None, form: KernelForm) -> Tensor:
        ctx.save_for_backward(weight, gain)
        ctx.mask, ctx.form = mask, form
        ctx.columns = form.standardize(*form.dense_rows(weight, mask), gain)
        return nsconv_kernel(weight, gain, mask, form, ctx.columns)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        weight, gain = ctx.saved_tensors
        grad_weight, grad_gain = nsconv_kernel_backward(weight, gain, ctx.mask, ctx.form, grad, ctx.columns)
        return grad_weight, grad_gain, None, None


def nsconv_kernel(
    weight: Tensor, gain: Tensor, mask: Tensor | None, form: KernelForm, columns: Columns | None = None
) -> Tensor:
    """`nsconv_weight` without autograd; `columns` are those of this weight, None to take them here."""
    values, rows = form.dense_rows(weight, mask)
    columns = columns or form.standardize(values, rows, gain)
    return form.kernel(standardized(values, rows, columns), weight.shape)


def nsconv_kernel_backward(
    weight: Tensor, gain: Tensor, mask: Tensor | None, form: KernelForm, grad: Tensor, columns: Columns | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `nsconv_weight` with respect to weight and gain.

    While growth candidates are collected, the gradient of an inactive weight is added: dL/dw_hat, or as that of the
    parameter scale * dL/dw_hat: its own effect, without its pull on the channel's mean and deviation.
    """
    values, rows = form.dense_rows(weight, mask)
    grad_rows = form.rows(grad).to(weight.dtype)
    columns = columns or form.standardize(values, rows, gain)
    if mask is not None and growth.is_collecting():
        scale = columns.scale
        growth.add_candidates(
            mask,
            form.kernel(grad_rows, weight.shape),
            of_parameter=lambda: form.kernel(grad_rows * scale, weight.shape),
        )
    grad_weight, grad_gain = standardize_backward(values, columns, rows, grad_rows, g=form.g)
    return form.kernel(grad_weight, weight.shape), grad_gain


@overridable
def nsconv_weight(
    weight: Tensor,
    gain: Tensor,
    mask: Tensor | None = None,
    *,
    g: float = 1.0,
    groups: int = 1,
    transposed: bool = False,
    statistics: Statistics = "active",
) -> Tensor:
    """The effective kernel of an NSConv; equations and guards stand in the module docstring.

    Args:
        weight: [out, in/groups, *kernel]; [in, out/groups, *kernel] of a transposed convolution; [out, in] of a linear.
        gain: gain_i, [out].
        mask: Boolean, of the weight's shape; None = all active.
        g: Gain of the nonlinearity that follows.
        groups: Groups of the convolution; they only matter when it is transposed.
        transposed: Whether it is a transposed convolution.
        statistics: Mean and deviation over the "active" weights or over "all" of a channel.

    Returns:
        w_hat, of the weight's shape, exactly 0 where masked.
    """
    form = KernelForm(g, groups, transposed, statistics)
    if is_traced():
        with weights_as_constants():
            return nsconv_kernel(weight, gain, mask, form)
    result: Tensor = _NSConvWeight.apply(weight, gain, mask, form)  # type: ignore[no-untyped-call]  # torch's own
    return result


@overridable
def channel_affine(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Gain and shift per channel: what is left of a BatchNorm whose layer has a kernel of unit gain.

    Args:
        x: [N, channels, *size].
        gain: [channels].
        shift: [channels].
    """
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return x * gain.reshape(shape) + shift.reshape(shape)
