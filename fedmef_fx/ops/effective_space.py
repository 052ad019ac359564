r"""Effective space: an NSConv's weights as they take effect, for what prunes, empties and grows them.

With w_hat = c_i (w - mean_i) / sqrt(s_i) (`ops/nsconv.py`; c_i = g gain_i) a weight has no effect where w_hat = 0,
which is at w = mean_i and not at w = 0. So an adjustment looks at w_hat:

- *lowest*: the active weights of lowest |w_hat|;
- *extrusion*: the surrogate loss P = lambda sum_{j in low} w_hat_j^2. With h = dP/dw_hat, that is 2 lambda w_hat where
  marked and 0 elsewhere, and b = w - mean_i on active weights, the backward of the kernel gives

      dP/dw    = c_i / sqrt(s_i) (h - sum(h) / N_i - b <h, b> / s_i)    on all active weights of the row,
      dP/dgain = g <h, b> / sqrt(s_i) = 2 lambda / gain_i sum_{j in low, row i} w_hat_j^2;

- *growth*: candidates by |dL/dw_hat|, and a grown weight starts where its w_hat is 0. With statistics over active
  weights that is the mean of the row's survivors, which the grown weights then leave as it is: neither mean_i nor s_i
  changes, so growing changes no output. With statistics over all F weights of a row, of which k are grown,
  mean_i = (S + k w) / F for the survivors' sum S, and w = mean_i gives w = S / (F - k).

Rows in which the kernel subtracts no mean (one active weight, or a deviation near zero) keep its rule: mean_i counts as
0, the first bracket loses its second term, and a grown weight starts at 0, which it does in an empty row as well.

A weight that is not standardised takes effect as it is: w_hat = w.
"""

import torch
from torch import Tensor

from fedmef_fx.ops.effective_weight import StoredWeight, effective_weight
from fedmef_fx.ops.nsconv import KernelForm, standardize_backward, standardized
from fedmef_fx.ops.packed_weight import active_values
from fedmef_fx.ops.rows import Rows

__all__ = ["effective_values", "penalty_gradients", "resting_weights"]


@torch.no_grad()
def effective_values(stored: StoredWeight) -> Tensor:
    """w_hat of the weights that are stored: of the dense shape, 0 where masked; `[active]` of a packed weight.

    Args:
        stored: The weight; it is not changed, and the result may be its own tensor where nothing is standardised.
    """
    weight, gain, mask, form, shape = stored
    if shape is not None and mask is not None:
        return active_values(weight, gain, mask, form, shape=shape)
    return effective_weight(stored).detach()


@torch.no_grad()
def penalty_gradients(stored: StoredWeight, places: Tensor, strength: float) -> tuple[Tensor, Tensor | None]:
    """Gradients of strength * sum of w_hat^2 over some active weights; equations stand in the module docstring.

    Args:
        stored: The weight.
        places: Flat places of the weights in `stored.weight`, int64; or booleans, flat: True at these places.
        strength: lambda, >= 0.

    Returns:
        The gradients of the stored weight, of its shape and exactly 0 where masked, and of gain, [out]; None without.
    """
    weight, gain, form = stored.weight.detach(), stored.gain, stored.form
    is_marked = places
    if places.dtype != torch.bool:
        is_marked = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        is_marked[places] = True
    if gain is None:
        return torch.where(is_marked.view_as(weight), 2 * strength * weight, 0.0), None
    values, rows, is_marked = _in_rows(stored, is_marked.view_as(weight))
    columns = form.standardize(values, rows, gain.detach())
    upstream = torch.where(is_marked, standardized(values, rows, columns).mul_(2 * strength), 0.0)
    gradient, gain_gradient = standardize_backward(values, columns, rows, upstream, g=form.g)
    if stored.packed_shape is None:
        gradient = form.kernel(gradient, weight.shape)
    return gradient, gain_gradient


def _in_rows(stored: StoredWeight, beside: Tensor) -> tuple[Tensor, Rows, Tensor]:
    """The stored values and a tensor of their shape in the form of the rows, and the rows."""
    weight, _, mask, form, shape = stored
    if shape is not None and mask is not None:
        return weight.detach(), form.packed_rows(mask, shape), beside
    values, rows = form.dense_rows(weight.detach(), mask)
    return values, rows, form.rows(beside)


@torch.no_grad()
def resting_weights(weight: Tensor, form: KernelForm, *, survivors: Tensor, grown: Tensor) -> Tensor:
    """Where grown weights of an NSConv have no effect: what each weight of a row has to be for its w_hat to be 0.

    Args:
        weight: The dense weight; what it is outside of the survivors has no effect.
        form: How it is standardised.
        survivors: Boolean, of its shape: the weights that were active before and stay so.
        grown: Boolean, of its shape: the weights that are new.

    Returns:
        One number per row, in the weight's shape.
    """
    values, rows = form.dense_rows(weight, survivors)
    columns = form.standardize(values, rows, torch.ones_like(values[:, 0]))
    start = columns.mean
    if form.statistics == "all":
        rest = rows.fan_in - form.rows(grown).sum(1, keepdim=True, dtype=start.dtype)
        start = torch.where(rest > 0, start * rows.fan_in / rest.clamp_min(1), 0.0)
    return form.kernel(start.expand_as(values), weight.shape)
