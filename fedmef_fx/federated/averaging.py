"""Weighted averages that do not depend on the order in which clients answer, to the last bit."""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError

__all__ = ["weighted_average"]

# Terms that are held in float64 at a time, 32 MiB.
_TERMS: Final = 2**22


def weighted_average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_c weight_c * tensor_c / sum_c weight_c, in float64.

    The terms of an element are sorted before they are added, so the order of clients does not matter.

    Args:
        tensors: One per client, of one shape and dtype, on the CPU. Floating point, integer or boolean.
        weights: One per client, > 0, e.g. numbers of samples.

    Returns:
        The average in the same dtype; integers are rounded to nearest, booleans to the majority.

    Raises:
        ConfigError: No tensors, tensors of different shapes or dtypes, or weights that are not positive.
    """
    if not tensors or len(tensors) != len(weights):
        raise ConfigError(f"weighted_average: got {len(tensors)} tensors and {len(weights)} weights; expected as many")
    if any(tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype for tensor in tensors):
        forms = ", ".join(sorted({f"{tensor.dtype}{list(tensor.shape)}" for tensor in tensors}))
        raise ConfigError(f"weighted_average: got {forms}; expected one shape and dtype")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"weighted_average: got weights {list(weights)}; expected finite numbers > 0")
    first = tensors[0]
    flat = [tensor.reshape(-1) for tensor in tensors]
    shares = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    total = math.fsum(weights)
    result = torch.empty(first.numel(), dtype=first.dtype)
    step = max(_TERMS // len(tensors), 1)
    for start in range(0, first.numel(), step):
        terms = torch.stack([tensor[start : start + step].double() for tensor in flat]).mul_(shares)
        average = terms.sort(dim=0).values.sum(dim=0) / total
        result[start : start + step] = average if first.is_floating_point() else average.round().to(first.dtype)
    return result.reshape(first.shape)
