"""PruneFL (Jiang et al., IEEE TNNLS 2022, arXiv 1909.12326): the server adjusts by squared gradients of all weights.

1. In an adjustment round every client uploads the mean squared gradient of every weight, active or not (O_d).
2. The server averages them, weighted by samples. Of each layer the k_l active weights of lowest magnitude and all
   inactive ones are up for choice; the k_l of them with the largest squared gradient are active afterwards. The others
   keep their places, so a weight of low magnitude stays where its gradient is large.

As in the comparison of the FedRTS paper every weight costs the same time (t_j = 1), and the density is fixed, where the
authors also choose how many weights there are. Masks start by magnitude, in place of the authors' pruning on a powerful
device.
"""

import dataclasses
from typing import ClassVar, Final

from torch import Tensor

from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.lazy_tensors import column
from fedmef_fx.federated.messages import ReportName
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.moves import change_masks
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.adjust import lowest_magnitude
from fedmef_fx.sparsity.selection import largest_positions

__all__ = ["PRUNEFL", "SquaredGradients"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredGradients(Adjustment):
    """See the module's docstring."""

    name: ClassVar[str] = "squared-gradients"
    report: ClassVar[ReportName] = "squares"

    def finish(self, after: AfterRound) -> dict[str, int]:
        """See `Adjustment.finish`."""
        if not after.is_due:
            return {}
        chosen = {}
        for name, parameter in masked_parameters(after.model).items():
            squares = weighted_average(column([update.scores for update in after.updates], name), after.samples)
            chosen[name] = chosen_by_squares(parameter.dense().cpu(), parameter.mask.cpu(), squares, after.counts[name])
        return change_masks(after.model, chosen)


def chosen_by_squares(weight: Tensor, mask: Tensor, squares: Tensor, k: int) -> Tensor:
    """The mask of one layer after an adjustment.

    Args:
        weight: A parameter, any shape.
        mask: Boolean, of its shape.
        squares: Squared gradients, `[numel]`.
        k: How many active weights are up for choice.
    """
    kept = mask.flatten().clone()
    kept[lowest_magnitude(weight, mask, k)] = False
    open_places = (~kept).nonzero().squeeze(1)
    kept[open_places[largest_positions(squares[open_places].float(), k)]] = True
    return kept.reshape(mask.shape)


PRUNEFL: Final = baseline("prunefl", "magnitude", SquaredGradients(), exchange="2 O_s + O_d")
