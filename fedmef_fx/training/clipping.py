"""Adaptive gradient clipping, which lets networks without BatchNorm train at larger learning rates.

Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021, Eq. 3: the gradient
G_i of a unit i (an output channel with all of its incoming weights W_i) is scaled down where it is large against them:

    G_i <- ratio * max(||W_i||, eps) / ||G_i|| * G_i    where ||G_i|| > ratio * max(||W_i||, eps)

Norms run over active weights only. Vectors (biases, gains) are one unit each, as in the authors' code.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmef_fx.config import is_ignored
from fedmef_fx.errors import ConfigError
from fedmef_fx.graph.operators import Layer, operator_of
from fedmef_fx.ops.rows import Rows, SegmentRows, packed_rows
from fedmef_fx.sparse_model.masks import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["clip_gradients"]


@torch.no_grad()
def clip_gradients(model: nn.Module, ratio: float, *, eps: float = 1e-3, ignore: Sequence[str | type] = ()) -> int:
    """Clip the gradients of a model in place, between `loss.backward()` and `optimizer.step()`.

    Args:
        model: Any model. Of one that `fedmef_fx.transform` made, gradients of masked weights become 0 as well.
        ratio: Largest allowed ratio of a unit's gradient norm to its weight norm, > 0; 0.01 to 0.1
            are usual. A step of plain gradient descent then changes a unit by at most `ratio` times the learning rate.
        eps: Least weight norm, >= 0, so that weights that start at 0 can grow.
        ignore: Modules whose parameters are left alone: names, globs or types. The authors leave the classifier alone.

    Returns:
        Number of units that were clipped.

    Raises:
        ConfigError: A ratio or eps out of range.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> layer.weight.grad = torch.tensor([[0.0, 10.0]])
        >>> clip_gradients(layer, 0.1), layer.weight.grad.tolist()
        (1, [[0.0, 0.5]])
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"clip_gradients: ratio: got {ratio!r}; expected a number > 0, e.g. 0.01")
    if not (math.isfinite(eps) and eps >= 0):
        raise ConfigError(f"clip_gradients: eps: got {eps!r}; expected a number >= 0")
    parameters = masked_parameters(model).values() if is_transformed(model) else ()
    masked = {id(masked_parameter.parameter): masked_parameter for masked_parameter in parameters}
    seen: set[int] = set()
    clipped = []
    for name, module in model.named_modules():
        if is_ignored(ignore, name, module):
            continue
        row = operator_of(type(module))
        unit = 1 if isinstance(row, Layer) and row.transposed else 0
        for parameter in module.parameters(recurse=False):
            if parameter.grad is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            masked_parameter = masked.get(id(parameter))
            if masked_parameter is not None and masked_parameter.is_packed:
                clipped.append(_clip_packed(masked_parameter, parameter.grad, ratio=ratio, eps=eps, unit=unit))
                continue
            if masked_parameter is not None:
                parameter.grad.mul_(masked_parameter.buffer)
            clipped.append(_clip(parameter, parameter.grad, ratio=ratio, eps=eps, unit=unit))
    return int(torch.stack([count.cpu() for count in clipped]).sum()) if clipped else 0


def _clip(weight: Tensor, gradient: Tensor, *, ratio: float, eps: float, unit: int) -> Tensor:
    """Clip one parameter's gradient; the number of clipped units, on its device."""
    is_vector = _is_vector(weight.shape)
    over = [axis for axis in range(weight.dim()) if is_vector or axis != unit]
    # In single precision at least: squares of small gradients vanish in float16.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    largest = torch.linalg.vector_norm(weight, dim=over, keepdim=True, dtype=dtype).clamp_min(eps).mul_(ratio)
    norm = torch.linalg.vector_norm(gradient, dim=over, keepdim=True, dtype=dtype)
    exceeds = norm > largest
    gradient.mul_(torch.where(exceeds, largest / norm, 1.0).to(gradient.dtype))
    count: Tensor = exceeds.sum()
    return count


def _is_vector(shape: torch.Size) -> bool:
    return sum(size > 1 for size in shape) <= 1


def _clip_packed(parameter: MaskedParameter, gradient: Tensor, *, ratio: float, eps: float, unit: int) -> Tensor:
    """`_clip` on active values."""
    values = parameter.parameter.detach()
    if _is_vector(parameter.shape):
        rows: Rows = SegmentRows(torch.tensor([values.numel()], device=values.device), parameter.numel)
    else:
        rows = packed_rows(parameter.buffer, parameter.shape, axis=unit)
    dtype = torch.promote_types(values.dtype, torch.float32)
    largest = rows.square_norm(values.to(dtype)).sqrt_().clamp_min_(eps).mul_(ratio)
    norm = rows.square_norm(gradient.to(dtype)).sqrt_()
    exceeds = norm > largest
    gradient.mul_(rows.spread(torch.where(exceeds, largest / norm, 1.0)).to(gradient.dtype))
    count: Tensor = exceeds.sum()
    return count
