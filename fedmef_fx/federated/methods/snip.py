"""SNIP (Lee et al., ICLR 2019) in a federation: connection sensitivity |g * w| of the global loss, once at the start.

1. Every client computes the gradient g of one batch at the initial dense weights w, and uploads it whole (O_d).
2. The server averages the gradients, weighted by samples: the gradient of one batch of all clients' data.
3. The weights of largest |g * w| over all layers together stay active for the whole run.
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

__all__ = ["SNIP", "ConnectionSensitivity"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionSensitivity(Opening):
    """See the module's docstring."""

    name: ClassVar[str] = "connection-sensitivity"
    report: ClassVar[ReportName | None] = "gradient"

    def masks(self, model: nn.Module, updates: Sequence[Update], *, active: int, sample: Tensor) -> dict[str, Tensor]:
        """See `Opening.masks`."""
        samples = [update.samples for update in updates]
        parameters = masked_parameters(model)
        scores = {
            name: (
                weighted_average(column([u.scores for u in updates], name), samples) * p.values().cpu().float()
            ).abs()
            for name, p in parameters.items()
        }
        return highest_overall(scores, {name: p.shape for name, p in parameters.items()}, active=active)


SNIP: Final = baseline("snip", ConnectionSensitivity(), "never", exchange="2 O_s")
"""Before the first round 2 O_d besides."""
