"""FedDST (Bibikar et al., AAAI 2022, arXiv 2112.09824): clients prune and grow, the server prunes what is too much.

1. In an adjustment round every client, after half of its local steps, prunes its k_l weights of lowest magnitude and
   grows k_l where the gradient of one batch is largest; it trains on, and uploads its weights with its own mask.
2. The server averages every weight over the clients that have it active, weighted by samples. The union of their
   masks has more weights than a layer may have: it keeps as many as before, those of largest magnitude.

The paper readjusts after some of a round's local epochs; half of the steps stands for that, so that a single local
epoch is enough.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from fedmef_fx.federated.messages import ReportName, Update
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.moves import change_masks
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound
from fedmef_fx.federated.state import ModelState
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.masks import magnitude_masks

__all__ = ["FEDDST", "ClientMasks", "averaged_where_active"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientMasks(Adjustment):
    """See the module's docstring."""

    name: ClassVar[str] = "client-masks"
    report: ClassVar[ReportName] = "masks"

    def merged(self, state: ModelState, updates: Sequence[Update]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """See `Adjustment.merged`; in adjustment rounds each weight is averaged over those that have it."""
        if not all(update.masks for update in updates):
            return super().merged(state, updates)
        samples = [update.samples for update in updates]
        masks, values = {}, {}
        for name in state.masks:
            own = [(update.masks[name], update.values[name]) for update in updates]
            masks[name], values[name] = averaged_where_active(own, samples)
        return masks, values

    def finish(self, after: AfterRound) -> dict[str, int]:
        """See `Adjustment.finish`."""
        if not after.is_due:
            return {}
        parameters = masked_parameters(after.model)
        counts = {name: int(mask.count_nonzero()) for name, mask in after.sent.items()}
        weights = {name: parameter.dense() for name, parameter in parameters.items()}
        chosen = magnitude_masks(weights, counts)
        # Where fewer clients grew than pruned, weights of magnitude 0 outside the union could come in: they may not.
        chosen = {name: mask & parameters[name].mask for name, mask in chosen.items()}
        return change_masks(after.model, chosen, before=after.sent)


def averaged_where_active(own: Sequence[tuple[Tensor, Tensor]], samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Average weights over the clients that have them active.

    Args:
        own: Pairs of a client's mask and its active values `[active]`.
        samples: The weight of each.

    Returns:
        The union of the masks, and the averages under it, in row-major order. The order of clients does not matter.
    """
    union = torch.stack([mask for mask, _ in own]).any(0)
    terms, shares = [], []
    for (mask, values), weight in zip(own, samples, strict=True):
        dense = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter_(mask, values.double())
        terms.append(dense[union] * weight)
        shares.append(mask[union].double() * weight)
    # Sorted before they are added, as in `averaging`.
    averages = torch.stack(terms).sort(dim=0).values.sum(0) / torch.stack(shares).sum(0)
    return union, averages.to(own[0][1].dtype)


FEDDST: Final = baseline("feddst", "random", ClientMasks(), exchange="2 O_s")
