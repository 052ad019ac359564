"""Adjustment by the server from the clients' top-k gradients, as FedTiny and FedMef do it.

1. Every client uploads the k_l largest |gradients| at inactive coordinates of each layer: values with positions
   (O_xi), or positions alone (half of that), which then count as 1 each.
2. The server averages them, weighted by samples; a coordinate that a client left out counts as 0.
3. It prunes the k_l active weights of lowest averaged magnitude, or with `prune_marked` those that clients were told to
   empty, and grows the k_l inactive coordinates of largest averaged |gradient|, without effect.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from fedmef_fx.federated.averaging import Candidates, weighted_candidates
from fedmef_fx.federated.lazy_tensors import LazyGradients, column
from fedmef_fx.federated.messages import ReportName, Update
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.sparse_gradient import SparseGradient
from fedmef_fx.training.adjustment import adjust

__all__ = ["TopGradients", "averaged_candidates"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopGradients(Adjustment):
    """See the module's docstring.

    Attributes:
        sends: What travels of each candidate: `"gradients"` for values with positions, or `"positions"` alone.
        prune_marked: Whether the weights are pruned that were lowest when the round began, which clients with extrusion
            have emptied, rather than those that are lowest after it.
    """

    name: ClassVar[str] = "server"
    granularities: ClassVar[frozenset[str]] = frozenset()  # any
    sends: Literal["gradients", "positions"] = "gradients"
    prune_marked: bool = False

    def asks(self) -> ReportName:
        """See `Adjustment.asks`."""
        return self.sends

    def finish(self, after: AfterRound) -> dict[str, int]:
        """See `Adjustment.finish`."""
        if not after.is_due:
            return {}
        sizes = {name: parameter.numel for name, parameter in masked_parameters(after.model).items()}
        marked = after.marked if self.prune_marked else None
        is_by_weight = transformation_of(after.model).config.granularity == "weight"
        found = averaged_candidates(after.updates, sizes, keep=after.counts if is_by_weight else None)
        return adjust(after.model, found, after.counts, marked=marked)


def averaged_candidates(
    updates: Sequence[Update], sizes: Mapping[str, int], *, keep: Mapping[str, int] | None = None
) -> Mapping[str, SparseGradient]:
    """Growth candidates of all clients, weighted by samples; those of a parameter are averaged when they are asked for.

    Args:
        updates: With gradients, or with votes, each of which counts as a gradient of 1.
        sizes: Parameter name -> number of weights.
        keep: Parameter name -> how many of the largest are needed; None for all.
    """
    return _Averages(updates, sizes, keep)


@dataclasses.dataclass(frozen=True, eq=False)
class _Averages(Mapping[str, SparseGradient]):
    """Of all parameters at once they would take more memory than the model."""

    updates: Sequence[Update]
    sizes: Mapping[str, int]
    keep: Mapping[str, int] | None

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, name: str) -> SparseGradient:
        clients = [_candidates(update, name, self.sizes[name]) for update in self.updates]
        keep = None if self.keep is None else self.keep[name]
        return weighted_candidates(clients, [update.samples for update in self.updates], keep=keep)


def _candidates(update: Update, name: str, numel: int) -> Candidates:
    if isinstance(update.gradients, LazyGradients):
        return Candidates(*update.gradients.parts(name))
    if name in update.gradients:
        gradient = update.gradients[name]
        return Candidates(gradient.positions, gradient.values, gradient.numel)
    (votes,) = column([update.votes], name)
    return Candidates(votes, None, numel)
