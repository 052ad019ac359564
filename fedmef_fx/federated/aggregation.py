"""Aggregators: what becomes of the updates of a round before a method averages them and adjusts masks.

The default averages all of them, weighted by samples. The others bound what a few wrong or hostile clients can do. They
work on sparse updates: all clients of a round have the same masks, so active values correspond; of growth candidates, a
coordinate that a client left out counts as 0. The order of clients never matters, to the last bit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.lazy_tensors import LazyTensor, MappedTensors, column, part_of
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.state import ModelState
from fedmef_fx.sparsity.sparse_gradient import SparseGradient

__all__ = [
    "Aggregator",
    "CoordinateMedian",
    "Krum",
    "MeanAroundMedian",
    "NormClipping",
    "TrimmedMean",
    "WeightedMean",
    "change_norm",
    "check_masks",
    "check_share",
    "check_values",
    "distances",
    "left_out",
    "scaled",
]

# Terms that are held in float64 at a time, 2 MiB: what is needed besides is a few times as much.
_TERMS: Final = 2**18

Reduce = Callable[[Tensor], Tensor]
"""Of `[clients, coordinates]`, sorted along the clients, to `[coordinates]`."""


class Aggregator:
    """Turns the updates of a round into those that the method averages, weighted by samples."""

    @property
    def fewest(self) -> int:
        """How many updates it needs."""
        return 1

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """What is to be averaged.

        Args:
            updates: At least `fewest`, by client.
            sent: What the clients started from.

        Raises:
            ConfigError: Updates of a method that this aggregator does not fit.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class WeightedMean(Aggregator):
    """All updates as they are."""

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        del sent
        return updates


@dataclasses.dataclass(frozen=True)
class TrimmedMean(Aggregator):
    """Of each coordinate, the mean without the lowest and the highest values; clients count alike (Yin et al. 2018).

    Attributes:
        trim: Share of the clients that is left out at either end, in [0, 0.5); at least one client where it is > 0.
    """

    trim: float = 0.1

    def __post_init__(self) -> None:
        check_share("TrimmedMean.trim", self.trim)

    @property
    def fewest(self) -> int:
        """See `Aggregator.fewest`."""
        return 3 if self.trim else 1

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        del sent
        count = left_out(self.trim, len(updates))
        return [_reduced(self, updates, lambda terms: terms[count : len(terms) - count].mean(0))]


def check_share(name: str, share: float) -> None:
    """Refuse what is no share of clients that may be left out."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 0.5:
        raise ConfigError(f"{name}: got {share!r}; expected a number in [0, 0.5)")


def left_out(share: float, clients: int) -> int:
    """How many of some clients a share is: at least one, and fewer than half."""
    return min(math.ceil(share * clients), (clients - 1) // 2)


@dataclasses.dataclass(frozen=True)
class MeanAroundMedian(Aggregator):
    """Of each coordinate, the mean of the values nearest to the median; clients count alike (Xie et al. 2018).

    Wrong values mostly lie on one side. A trimmed mean cuts as much off at the other, where the clients are that have
    most to say of a coordinate, and slows training down where labels are skewed; here only the farthest values go.

    Attributes:
        faulty: Share of the clients that may be wrong and is left out, in [0, 0.5); at least one where it is > 0.
    """

    faulty: float = 0.1

    def __post_init__(self) -> None:
        check_share("MeanAroundMedian.faulty", self.faulty)

    @property
    def fewest(self) -> int:
        """See `Aggregator.fewest`."""
        return 3 if self.faulty else 1

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        del sent
        count = left_out(self.faulty, len(updates))
        return [_reduced(self, updates, functools.partial(_around_median, count=count))]


def _around_median(terms: Tensor, *, count: int) -> Tensor:
    """The mean without the `count` values farthest from the median; of two that are as far, the lower one stays."""
    kept = len(terms) - count
    median = _median(terms)
    first = torch.zeros_like(median, dtype=torch.int64)  # of what is kept: it lies side by side, as terms are sorted
    for gone in range(count):
        last = first + (len(terms) - 1 - gone)
        low, high = terms.gather(0, first[None])[0], terms.gather(0, last[None])[0]
        first += median - low > high - median
    return terms.gather(0, first + torch.arange(kept).unsqueeze(1)).mean(0)


@dataclasses.dataclass(frozen=True)
class CoordinateMedian(Aggregator):
    """Of each coordinate, the median; clients count alike (Yin et al. 2018)."""

    @property
    def fewest(self) -> int:
        """See `Aggregator.fewest`."""
        return 3

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        del sent
        return [_reduced(self, updates, _median)]


def _median(terms: Tensor) -> Tensor:
    middle = len(terms) // 2
    return terms[middle] if len(terms) % 2 else (terms[middle - 1] + terms[middle]) / 2


@dataclasses.dataclass(frozen=True)
class NormClipping(Aggregator):
    """The mean of updates none of which moves the model by more than `norm`.

    Attributes:
        norm: Largest L2 norm of what a client changes in all floating-point tensors together, > 0.
    """

    norm: float

    def __post_init__(self) -> None:
        if isinstance(self.norm, bool) or not isinstance(self.norm, int | float) or not 0 < self.norm < math.inf:
            raise ConfigError(f"NormClipping.norm: got {self.norm!r}; expected a number > 0")

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        check_masks(self, updates)
        return [self._clipped(update, sent) for update in updates]

    def _clipped(self, update: Update, sent: ModelState) -> Update:
        norm = change_norm(update, sent)
        return update if norm <= self.norm else scaled(update, sent, self.norm / norm)


@dataclasses.dataclass(frozen=True)
class Krum(Aggregator):
    """The updates that are closest to their neighbours (Blanchard et al. 2017; several: Multi-Krum).

    Attributes:
        faulty: f, how many clients of a round may be wrong, >= 0; it takes 2 f + 3 clients.
        keep: How many updates are averaged, >= 1; None for all but 2 f + 2.
    """

    faulty: int
    keep: int | None = 1

    def __post_init__(self) -> None:
        if type(self.faulty) is not int or self.faulty < 0:
            raise ConfigError(f"Krum.faulty: got {self.faulty!r}; expected an integer >= 0")
        if self.keep is not None and (type(self.keep) is not int or self.keep < 1):
            raise ConfigError(f"Krum.keep: got {self.keep!r}; expected an integer >= 1, or None")

    @property
    def fewest(self) -> int:
        """See `Aggregator.fewest`."""
        return 2 * self.faulty + 3

    def combine(self, updates: Sequence[Update], sent: ModelState) -> Sequence[Update]:
        """See `Aggregator.combine`."""
        check_masks(self, updates)
        ordered = sorted(updates, key=lambda update: update.client)
        neighbours = len(ordered) - self.faulty - 2
        squared = distances(ordered, sent)
        # Of each row the distance to itself, 0, comes first.
        scores = squared.sort(dim=1).values[:, 1 : neighbours + 1].sum(1)
        keep = self.keep if self.keep is not None else max(len(ordered) - 2 * self.faulty - 2, 1)
        chosen = scores.argsort(stable=True)[:keep].sort().values
        return [ordered[index] for index in chosen.tolist()]


def distances(updates: Sequence[Update], sent: ModelState) -> Tensor:
    """Squared distances between all updates, float64 `[clients, clients]`; two of them are in memory at a time."""
    result = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for row, left in enumerate(updates):
        change = _change(left, sent)
        for other, right in enumerate(updates[:row]):
            distance = (change - _change(right, sent)).square().sum()
            result[row, other] = result[other, row] = distance
    return result


def change_norm(update: Update, sent: ModelState) -> float:
    """L2 norm of what a client changed in all floating-point tensors."""
    return float(torch.linalg.vector_norm(_change(update, sent)))


def scaled(update: Update, sent: ModelState, scale: float) -> Update:
    """An update whose changes of floating-point tensors are a share of what they were."""

    def of(before: Mapping[str, Tensor], name: str, start: int, stop: int, part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return part
        was = before[name].reshape(-1)[start:stop].double()
        return (was + scale * (part.double() - was)).to(part.dtype)

    return dataclasses.replace(
        update,
        values=MappedTensors(update.values, functools.partial(of, sent.values)),
        dense=MappedTensors(update.dense, functools.partial(of, sent.dense)),
    )


def _change(update: Update, sent: ModelState) -> Tensor:
    """What a client changed in all floating-point tensors, float64 `[coordinates]`."""
    pairs = [(tensor, sent.values[name]) for name, tensor in update.values.items()]
    pairs += [(tensor, sent.dense[name]) for name, tensor in update.dense.items() if tensor.is_floating_point()]
    changes = [(after.double() - before.double()).flatten() for after, before in pairs]
    return torch.cat(changes) if changes else torch.zeros(0, dtype=torch.float64)


def check_masks(aggregator: Aggregator, updates: Sequence[Update]) -> None:
    """Refuse clients with masks of their own."""
    if any(update.masks for update in updates):
        raise ConfigError(
            f"{type(aggregator).__name__}: got clients with masks of their own, whose weights do not correspond; "
            "expected WeightedMean() for this method"
        )


def check_values(aggregator: Aggregator, updates: Sequence[Update]) -> None:
    """Refuse votes for growth, which have no values to average."""
    if any(update.votes for update in updates):
        raise ConfigError(
            f"{type(aggregator).__name__}: got votes for growth without values; expected WeightedMean(), "
            "NormClipping(...) or Krum(...) for this method"
        )


def _reduced(aggregator: Aggregator, updates: Sequence[Update], reduce: Reduce) -> Update:
    """One update in the place of all, coordinate by coordinate."""
    check_masks(aggregator, updates)
    check_values(aggregator, updates)
    first = updates[0]
    return dataclasses.replace(
        first,
        samples=sum(update.samples for update in updates),
        values={name: _coordinates(column([u.values for u in updates], name), reduce) for name in first.values},
        dense={name: _coordinates(column([u.dense for u in updates], name), reduce) for name in first.dense},
        scores={name: _coordinates(column([u.scores for u in updates], name), reduce) for name in first.scores},
        gradients={name: _candidates([u.gradients[name] for u in updates], reduce) for name in first.gradients},
    )


def _coordinates(tensors: Sequence[Tensor | LazyTensor], reduce: Reduce) -> Tensor:
    first = tensors[0]
    numel = first.shape.numel()
    result = torch.empty(numel, dtype=first.dtype)
    step = max(_TERMS // len(tensors), 1)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        terms = torch.stack([part_of(tensor, start, stop).double() for tensor in tensors]).sort(dim=0).values
        reduced = reduce(terms)
        result[start:stop] = reduced if first.dtype.is_floating_point else reduced.round().to(first.dtype)
    return result.reshape(first.shape)


def _candidates(gradients: Sequence[SparseGradient], reduce: Reduce) -> SparseGradient:
    first = gradients[0]
    positions = torch.cat([gradient.positions for gradient in gradients])
    positions = positions.unique()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    rows = []
    for gradient in gradients:
        row = torch.zeros(len(positions), dtype=gradient.values.dtype)
        row[torch.searchsorted(positions, gradient.positions)] = gradient.values
        rows.append(row)
    return SparseGradient(positions, _coordinates(rows, reduce), first.numel)
