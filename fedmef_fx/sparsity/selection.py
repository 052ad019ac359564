"""Exactly k extreme values of a tensor, also when values tie: the rule that every party of a federation shares.

`torch.topk` leaves open which of several equal values it takes, so that two machines could prune different weights.
Here the earlier position wins.
"""

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError

__all__ = ["largest_positions", "magnitudes", "smallest_positions"]


def magnitudes(values: Tensor) -> Tensor:
    """Absolute values, detached and flat (row-major), in at least single precision."""
    return values.detach().flatten().abs().to(torch.promote_types(values.dtype, torch.float32))


def largest_positions(values: Tensor, k: int) -> Tensor:
    """Positions of the k largest values of a 1-D tensor; of equal values the earlier position wins.

    Args:
        values: 1-D, floating point.
        k: How many, between 0 and the number of values.

    Returns:
        `k` positions, int64, ascending.

    Raises:
        ConfigError: k out of range, or values that are not a number among the k largest.
    """
    return _extreme_positions(values, k, largest=True)


def smallest_positions(values: Tensor, k: int) -> Tensor:
    """Positions of the k smallest values of a 1-D tensor; the counterpart of `largest_positions`."""
    return _extreme_positions(values, k, largest=False)


def _extreme_positions(values: Tensor, k: int, *, largest: bool) -> Tensor:
    if not 0 <= k <= values.numel():
        raise ConfigError(f"selection: got k={k}; expected 0 <= k <= {values.numel()}, the number of candidates")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    chosen = torch.topk(values, k, largest=largest, sorted=False).values
    threshold = chosen.min() if largest else chosen.max()
    if bool(threshold.isnan()):
        raise ConfigError("selection: got values that are not a number; expected finite ones: training has diverged")
    beyond = (values > threshold if largest else values < threshold).nonzero().squeeze(1)
    tied = (values == threshold).nonzero().squeeze(1)
    return torch.cat([beyond, tied[: k - beyond.numel()]]).sort().values
