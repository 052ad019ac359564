"""SynFlow (Tanaka et al., NeurIPS 2020): synaptic flow of the initial weights, without any data.

    R = sum of the outputs for an input of ones, with |w| in place of w
    score = |w| * dR/d|w|

1. The server alone computes scores, in eval mode and double precision; nothing travels.
2. It prunes in 100 steps, after step j down to the share density^(j / 100), with scores of what is left each time:
   so no layer is cut through while others have weights to spare.
3. The masks stay for the whole run.
"""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.moves import highest_overall
from fedmef_fx.federated.methods.policies import Opening
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter
from fedmef_fx.sparse_model.parameters import masked_parameters

__all__ = ["SYNFLOW", "SynapticFlow"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SynapticFlow(Opening):
    """See the module's docstring.

    Attributes:
        steps: Of pruning.
    """

    name: ClassVar[str] = "synaptic-flow"
    steps: int = 100

    def masks(self, model: nn.Module, updates: Sequence[Update], *, active: int, sample: Tensor) -> dict[str, Tensor]:
        """See `Opening.masks`."""
        if not sample.is_floating_point():
            raise ConfigError(
                f"synflow: got inputs of {sample.dtype}; expected floating point ones, as it feeds the model ones"
            )
        network = copy.deepcopy(model).double().eval()
        parameters = masked_parameters(network)
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.abs_()
        weights = {name: parameter.values() for name, parameter in parameters.items()}
        ones = torch.ones(1, *sample.shape, dtype=torch.float64, device=next(network.parameters()).device)
        chosen = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
        for count in _counts(sum(shape.numel() for shape in shapes.values()), active, steps=self.steps):
            for name, parameter in parameters.items():
                parameter.write(weights[name] * chosen[name].flatten().to(weights[name].device))
            chosen = highest_overall(_flow(network, parameters, ones), shapes, active=count)
        return chosen


def _counts(total: int, active: int, *, steps: int) -> Iterator[int]:
    """Weights that are left after each step: total * (active / total)^(step / steps)."""
    for step in range(1, steps + 1):
        yield active if step == steps else max(round(total * (active / total) ** (step / steps)), active)


def _flow(network: nn.Module, parameters: dict[str, MaskedParameter], ones: Tensor) -> dict[str, Tensor]:
    """Scores of all weights, [numel]."""
    network.zero_grad()
    with torch.enable_grad():
        network(ones).sum().backward()
    scores = {}
    for name, parameter in parameters.items():
        gradient = parameter.parameter.grad
        flow = torch.zeros(parameter.numel) if gradient is None else parameter.collect(gradient) * parameter.values()
        scores[name] = flow.abs().cpu().double()
    return scores


SYNFLOW: Final = baseline("synflow", SynapticFlow(), "never", exchange="2 O_s")
