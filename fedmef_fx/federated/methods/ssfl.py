"""SSFL (Ohib et al., TMLR 2026, arXiv 2405.09037): averaged saliencies of the clients, once at the start.

1. Every client computes |g * w| at the initial dense weights from one batch, and uploads it for every weight (O_d).
2. The server averages these saliencies, weighted by samples. Unlike SNIP's they do not cancel between clients.
3. The weights of largest average over all layers together stay active for the whole run.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Final

from torch import Tensor, nn

from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.lazy_tensors import column
from fedmef_fx.federated.messages import ReportName, Update
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.moves import highest_overall
from fedmef_fx.federated.methods.policies import Opening
from fedmef_fx.sparse_model.parameters import masked_parameters

__all__ = ["SSFL", "AveragedSaliency"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragedSaliency(Opening):
    """See the module's docstring."""

    name: ClassVar[str] = "averaged-saliency"
    report: ClassVar[ReportName | None] = "saliency"

    def masks(self, model: nn.Module, updates: Sequence[Update], *, active: int, sample: Tensor) -> dict[str, Tensor]:
        """See `Opening.masks`."""
        samples = [update.samples for update in updates]
        shapes = {name: parameter.shape for name, parameter in masked_parameters(model).items()}
        scores = {name: weighted_average(column([u.scores for u in updates], name), samples) for name in shapes}
        return highest_overall(scores, shapes, active=active)


SSFL: Final = baseline("ssfl", AveragedSaliency(), "never", exchange="2 O_s")
"""Before the first round 2 O_d besides."""
