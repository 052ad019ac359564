"""FedRTS (Huang et al., NeurIPS 2025, arXiv 2501.19122): Thompson sampling over Beta posteriors, one per weight.

Of a layer K weights are active, kappa = K - k_l(t) of them are its core. After every round the server observes

    X = gamma * X_agg + (1 - gamma) * sum_n p_n X_n        (Eq. 3), p_n a client's share of the samples
    active weight:   X_agg, X_n = 1 if among the kappa largest |W_agg|, |W_n|, else 0        (Eq. 4)
    inactive weight, adjustment rounds only:
                     X_n = 1 if client n names it among its k_l largest |gradients|, else 0; X_agg = 1/2        (Eq. 5)

and updates (alpha, beta) += (lambda X, lambda (1 - X)) (Eq. 6). In an adjustment round it then draws xi ~ Beta(alpha,
beta) for every weight; the K largest are active from then on (Eq. 2), those that are new start at 0.

Clients send positions without values: 2 O_s + 0.5 O_xi.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from fedmef_fx.federated.messages import ReportName
from fedmef_fx.federated.methods.baseline import baseline
from fedmef_fx.federated.methods.moves import change_masks
from fedmef_fx.federated.methods.policies import Adjustment, AfterRound
from fedmef_fx.federated.seeds import derive_seed
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.masks import random_generator
from fedmef_fx.sparsity.selection import largest_positions, magnitudes

__all__ = ["FEDRTS", "ThompsonSampling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThompsonSampling(Adjustment):
    """See the module's docstring; defaults are the paper's.

    Attributes:
        trade_off: gamma, weight of the averaged model beside the single ones, in [0, 1].
        scale: lambda, how much an outcome counts, > 0.
        prior: alpha and beta of a weight that has not been observed, > 0.
    """

    name: ClassVar[str] = "thompson-sampling"
    report: ClassVar[ReportName] = "positions"
    trade_off: float = 0.5
    scale: float = 10.0
    prior: float = 1.0

    def finish(self, after: AfterRound) -> dict[str, int]:
        """See `Adjustment.finish`."""
        parameters = masked_parameters(after.model)
        seed = derive_seed(transformation_of(after.model).config.seed, "thompson", after.round_index)
        chosen = {}
        for name, parameter in parameters.items():
            mask, k = after.sent[name], after.counts[name]
            own = [update.values[name] for update in after.updates]
            shares = [samples / sum(after.samples) for samples in after.samples]
            outcomes = torch.full(mask.shape, torch.nan).flatten()
            active = mask.flatten()
            outcomes[active] = self._active_outcomes(parameter.values().cpu(), own, shares, k)
            if after.is_due:
                votes = [update.votes[name] for update in after.updates]
                outcomes[~active] = self._inactive_outcomes(votes, shares, mask.numel())[~active]
            alpha, beta = self._observe(after, name, outcomes)
            if after.is_due and k:
                drawn = torch.from_numpy(random_generator(seed, name).beta(alpha.numpy(), beta.numpy()))
                new = torch.zeros_like(active)
                new[largest_positions(drawn, int(active.count_nonzero()))] = True
                chosen[name] = new.reshape(mask.shape)
            elif after.is_due:
                chosen[name] = mask
        return change_masks(after.model, chosen, before=after.sent) if after.is_due else {}

    def _active_outcomes(self, averaged: Tensor, own: Sequence[Tensor], shares: Sequence[float], k: int) -> Tensor:
        """Eq. 3 and 4, `[active]`."""
        core = averaged.numel() - k
        single = sum(share * _is_largest(values, core) for values, share in zip(own, shares, strict=True))
        return self.trade_off * _is_largest(averaged, core) + (1 - self.trade_off) * single

    def _inactive_outcomes(self, votes: Sequence[Tensor], shares: Sequence[float], numel: int) -> Tensor:
        """Eq. 3 and 5, `[numel]`."""
        single = torch.zeros(numel)
        for positions, share in zip(votes, shares, strict=True):
            single[positions] += share
        return self.trade_off * 0.5 + (1 - self.trade_off) * single

    def _observe(self, after: AfterRound, name: str, outcomes: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 6; where there is no outcome (NaN) the posterior stays."""
        result = []
        for key, gained in (("alpha", outcomes), ("beta", 1 - outcomes)):
            before = after.memory.get(f"{key}/{name}")
            before = torch.full_like(outcomes, self.prior) if before is None else before
            after.memory[f"{key}/{name}"] = before + self.scale * gained.nan_to_num(0.0)
            result.append(after.memory[f"{key}/{name}"])
        return result[0], result[1]


def _is_largest(values: Tensor, count: int) -> Tensor:
    """1 for the largest magnitudes, 0 for the others."""
    result = torch.zeros(values.numel())
    result[largest_positions(magnitudes(values), count)] = 1.0
    return result


FEDRTS: Final = baseline("fedrts", "random", ThompsonSampling(), exchange="2 O_s + 0.5 O_xi")
