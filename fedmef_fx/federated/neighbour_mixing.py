"""Mixing by nearest neighbours: an aggregator in front of another one, for clients whose labels differ.

Aggregators by coordinate take what few sound clients know for wrong values, as it lies apart from the others. Averaged
with its nearest neighbours first, each sound update says nearly the same, and what is wrong is nobody's neighbour
(Allouah et al., Fixing by Mixing, AISTATS 2023, algorithm NNM).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.aggregation import (
    Aggregator,
    TrimmedMean,
    check_masks,
    check_share,
    check_values,
    distances,
    left_out,
)
from fedmef_fx.federated.lazy_tensors import LazyTensors, column, part_of
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.state import ModelState, TensorSpec
from fedmef_fx.sparsity.sparse_gradient import SparseGradient, average_sparse_gradients

__all__ = ["NeighbourMixing"]


@dataclasses.dataclass(frozen=True)
class NeighbourMixing(Aggregator):
    """Each update becomes the mean of those nearest to it, itself among them; then another aggregator combines them.

    Near is a small L2 norm of the difference of all floating-point tensors. Clients count alike.

    Attributes:
        aggregator: What combines the means.
        faulty: Share of the clients that may be wrong, in [0, 0.5): as many have no part in a mean, at least one where
            it is > 0.

    Raises:
        ConfigError: A share out of range, or no aggregator.
    """

    aggregator: Aggregator = dataclasses.field(default_factory=TrimmedMean)
    faulty: float = 0.1

    def __post_init__(self) -> None:
        check_share("NeighbourMixing.faulty", self.faulty)
        if not isinstance(self.aggregator, Aggregator):
            raise ConfigError(
                f"NeighbourMixing.aggregator: got {self.aggregator!r}; expected an Aggregator, e.g. TrimmedMean(0.1)"
            )

    @property
    def fewest(self) -> int:
        """See `Aggregator.fewest`."""
        return max(self.aggregator.fewest, 3 if self.faulty else 1)

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        check_masks(self, updates)
        check_values(self, updates)
        ordered = sorted(updates, key=lambda update: update.client)
        count = len(ordered) - left_out(self.faulty, len(ordered))
        nearest = distances(ordered, sent).argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
        mixed = [
            _mean(update, [ordered[index] for index in row])
            for update, row in zip(ordered, nearest.tolist(), strict=True)
        ]
        return self.aggregator.combine(mixed, sent)


def _mean(update: Update, near: Sequence[Update]) -> Update:
    """The update with tensors that are means."""
    return dataclasses.replace(
        update,
        values=_MeanTensors([one.values for one in near]),
        dense=_MeanTensors([one.dense for one in near]),
        scores=_MeanTensors([one.scores for one in near]),
        gradients=_MeanGradients([one.gradients for one in near]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _MeanTensors(LazyTensors):
    """Means of the tensors of several clients, part by part."""

    each: Sequence[Mapping[str, Tensor]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.each[0])

    def __len__(self) -> int:
        return len(self.each[0])

    def spec(self, name: str) -> TensorSpec:
        """See `LazyTensors.spec`."""
        first = self.each[0]
        return first.spec(name) if isinstance(first, LazyTensors) else TensorSpec.of(first[name])

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """See `LazyTensors.part`."""
        dtype = self.spec(name).dtype
        total = torch.zeros(stop - start, dtype=torch.float64)
        for tensor in column(self.each, name):
            total += part_of(tensor, start, stop).double()
        mean = total / len(self.each)
        return mean.to(dtype) if dtype.is_floating_point else mean.round().to(dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _MeanGradients(Mapping[str, SparseGradient]):
    """Means of the growth candidates of several clients; a coordinate that a client left out counts as 0."""

    each: Sequence[Mapping[str, SparseGradient]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.each[0])

    def __len__(self) -> int:
        return len(self.each[0])

    def __getitem__(self, name: str) -> SparseGradient:
        return average_sparse_gradients([(gradients[name], 1.0) for gradients in self.each])
