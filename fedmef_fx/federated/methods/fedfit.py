"""FedFit (ICML 2026): the server adjusts by scores from the loss's second order, with a diagonal Fisher matrix F.

    prune   where removing w costs least:  -g w + w^2 F / 2
    grow    where a step gains most:       g^2 / (2 F)
    F = diag(A) (x) diag(G)                K-FAC's factors, see `training.fisher`

1. In an adjustment round every client computes both scores from its data. It uploads those of all active weights, and
   of inactive ones the k_l largest with their positions.
2. The server averages them, weighted by samples; a growth score that a client left out counts as 0. It prunes the k_l
   lowest and grows the k_l largest.

The abstract and the criteria are public, the paper's message format is not known to us: what travels is a choice made
here.
"""

import dataclasses
from typing import ClassVar, Final

from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.lazy_tensors import column
from fedmef_fx.federated.messages import ReportName
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.moves import change_masks
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound
from fedmef_fx.federated.methods.top_gradients import averaged_candidates
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.selection import largest_positions, smallest_positions

__all__ = ["FEDFIT", "FisherScores"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FisherScores(Adjustment):
    """See the module's docstring."""

    name: ClassVar[str] = "fisher-scores"
    report: ClassVar[ReportName] = "fisher"

    def finish(self, after: AfterRound) -> dict[str, int]:
        """See `Adjustment.finish`."""
        if not after.is_due:
            return {}
        sizes = {name: mask.numel() for name, mask in after.sent.items()}
        candidates = averaged_candidates(after.updates, sizes)
        chosen = {}
        for name, parameter in masked_parameters(after.model).items():
            scores = weighted_average(column([update.scores for update in after.updates], name), after.samples)
            gains = candidates[name]
            useful = gains.values > 0
            positions, values = gains.positions[useful], gains.values[useful]
            k = min(after.counts[name], positions.numel())
            active = parameter.positions().cpu()
            mask = parameter.mask.cpu().flatten().clone()
            mask[active[smallest_positions(scores, k)]] = False
            mask[positions[largest_positions(values, k)]] = True
            chosen[name] = mask.reshape(parameter.shape)
        return change_masks(after.model, chosen)


FEDFIT: Final = baseline("fedfit", "random", FisherScores(), exchange="3 O_s + O_xi")
