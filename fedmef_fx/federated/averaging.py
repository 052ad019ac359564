"""Weighted averages that do not depend on the order in which clients answer, to the last bit."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.lazy_tensors import LazyTensor, part_of
from fedmef_fx.sparsity.selection import largest_positions, magnitudes
from fedmef_fx.sparsity.sparse_gradient import SparseGradient, average_sparse_gradients

__all__ = ["Candidates", "weighted_average", "weighted_candidates"]

# Terms that are held in float64 at a time, 2 MiB: what is needed besides is a few times as much.
_TERMS: Final = 2**18


def weighted_average(tensors: Sequence[Tensor | LazyTensor], weights: Sequence[float]) -> Tensor:
    """sum_c weight_c * tensor_c / sum_c weight_c, in float64.

    The terms of an element are sorted before they are added, so the order of clients does not matter.

    Args:
        tensors: One per client, of one shape and dtype, on the CPU, or lazy ones, of which few elements are read at a
            time. Floating point, integer or boolean.
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
    shares = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    total = math.fsum(weights)
    numel = first.shape.numel()
    result = torch.empty(numel, dtype=first.dtype)
    step = max(_TERMS // len(tensors), 1)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        terms = torch.stack([part_of(tensor, start, stop).double() for tensor in tensors]).mul_(shares)
        average = terms.sort(dim=0).values.sum(dim=0) / total
        result[start : start + step] = average if first.dtype.is_floating_point else average.round().to(first.dtype)
    return result.reshape(first.shape)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Growth candidates of one client and one parameter, read in parts.

    Attributes:
        positions: int64 `[k]`, ascending.
        values: `[k]`; None for votes, each of which counts as a gradient of 1.
        numel: Number of weights of the parameter.
    """

    positions: Tensor | LazyTensor
    values: Tensor | LazyTensor | None
    numel: int

    @property
    def count(self) -> int:
        """K."""
        return self.positions.shape.numel()

    def between(self, low: int, high: int) -> SparseGradient:
        """Those at positions from `low` to below `high`."""
        first, last = self._place(low), self._place(high)
        positions = part_of(self.positions, first, last)
        values = torch.ones(len(positions)) if self.values is None else part_of(self.values, first, last)
        return SparseGradient(positions, values, self.numel)

    def _place(self, bound: int) -> int:
        """How many positions are below a bound."""
        if isinstance(self.positions, Tensor):
            return int(torch.searchsorted(self.positions, bound))
        positions = self.positions
        return bisect.bisect_left(range(self.count), bound, key=lambda place: int(positions.part(place, place + 1)))


def weighted_candidates(
    clients: Sequence[Candidates], weights: Sequence[float], *, keep: int | None = None
) -> SparseGradient:
    """`average_sparse_gradients`, of which few coordinates are looked at at a time.

    Args:
        clients: Growth candidates of one parameter, at least one client's.
        weights: One per client, > 0.
        keep: How many of the largest averages are needed, of equal ones the first; None for all.
    """
    numel = clients[0].numel
    blocks = max(math.ceil(sum(client.count for client in clients) / _TERMS), 1)
    bounds = [numel * block // blocks for block in range(blocks + 1)]
    found: SparseGradient | None = None
    for low, high in itertools.pairwise(bounds):
        part = average_sparse_gradients(
            [(client.between(low, high), weight) for client, weight in zip(clients, weights, strict=True)]
        )
        positions, values = part.positions, part.values
        if found is not None:
            positions, values = torch.cat([found.positions, positions]), torch.cat([found.values, values])
        if keep is not None and keep < len(positions):
            chosen = largest_positions(magnitudes(values), keep)
            positions, values = positions[chosen], values[chosen]
        found = SparseGradient(positions, values, numel)
    assert found is not None  # noqa: S101  # there is at least one block
    return found
