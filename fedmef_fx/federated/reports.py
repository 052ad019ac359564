"""What a client finds out for the adjustment of masks, beside its trained weights: one function per kind of report.

`messages.REPORTS` says what of it travels, the policies in `methods` what becomes of it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmef_fx.federated.batches import Batch
from fedmef_fx.federated.messages import ReportName, RoundTask
from fedmef_fx.sparse_model.masks import masks
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparsity.selection import largest_positions
from fedmef_fx.sparsity.sparse_gradient import SparseGradient
from fedmef_fx.training.adjustment import adjust
from fedmef_fx.training.fisher import mean_gradients_and_fisher
from fedmef_fx.training.full_gradients import mean_gradients, mean_squared_gradients
from fedmef_fx.training.growth import growth_candidates

__all__ = ["Findings", "findings_of", "readjusted_midway"]

BatchLoss = Callable[[nn.Module, Batch], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The fields of an `Update` that a report fills; see there."""

    gradients: Mapping[str, SparseGradient] = dataclasses.field(default_factory=dict)
    votes: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    masks: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


def findings_of(model: nn.Module, batch_loss: BatchLoss, parts: Iterable[Batch], task: RoundTask) -> Findings:
    """What a task asks for beside weights, of a model that has been trained, or not yet in an opening.

    Args:
        model: The client's model.
        batch_loss: Mean loss of a batch.
        parts: Batches of local data.
        task: The round.
    """
    if task.counts is None and not task.is_opening:
        return Findings()
    return _COLLECTORS[task.report](model, batch_loss, parts, dict(task.counts or {}))


_Collector = Callable[[nn.Module, BatchLoss, Iterable[Batch], dict[str, int]], Findings]


def _top_gradients(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    found = growth_candidates(model, loss, parts, k=counts)
    return Findings(
        gradients={name: SparseGradient(g.positions.cpu(), g.values.cpu(), g.numel) for name, g in found.items()}
    )


def _top_positions(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    found = growth_candidates(model, loss, parts, k=counts)
    return Findings(votes={name: gradient.positions.cpu() for name, gradient in found.items()})


def _own_masks(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    return Findings(masks={name: mask.cpu() for name, mask in masks(model).items()})


def _squares(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    return Findings(scores=mean_squared_gradients(model, loss, parts))


def _gradient(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    return Findings(scores=mean_gradients(model, loss, parts))


def _saliency(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    gradients, parameters = mean_gradients(model, loss, parts), masked_parameters(model)
    weights = {name: parameter.dense().flatten().float().cpu() for name, parameter in parameters.items()}
    return Findings(scores={name: (gradient * weights[name]).abs() for name, gradient in gradients.items()})


def _fisher(model: nn.Module, loss: BatchLoss, parts: Iterable[Batch], counts: dict[str, int]) -> Findings:
    gradients, fisher = mean_gradients_and_fisher(model, loss, parts)
    scores, candidates = {}, {}
    for name, parameter in masked_parameters(model).items():
        weight, active = parameter.values().float().cpu(), parameter.mask.flatten().cpu()
        g, f = gradients[name], fisher[name]
        scores[name] = -g[active] * weight + weight.square() * f[active] / 2
        gains = torch.where(f > 0, g.square() / (2 * f), 0.0)
        inactive = (~active).nonzero().squeeze(1)
        chosen = inactive[largest_positions(gains[inactive], counts[name])]
        candidates[name] = SparseGradient(chosen, gains[chosen], active.numel())
    return Findings(scores=scores, gradients=candidates)


_COLLECTORS: Final[Mapping[ReportName, _Collector]] = {
    "gradients": _top_gradients,
    "positions": _top_positions,
    "masks": _own_masks,
    "squares": _squares,
    "fisher": _fisher,
    "gradient": _gradient,
    "saliency": _saliency,
}


@contextlib.contextmanager
def readjusted_midway(
    model: nn.Module,
    optimizer: Optimizer,
    task: RoundTask,
    *,
    steps: int,
    batch: Callable[[], Batch],
    batch_loss: BatchLoss,
) -> Iterator[None]:
    """A block of local training in which the client itself adjusts its masks, where the task asks for own masks.

    After half of the steps (rounded down, at least one) it prunes its k_l lowest weights and grows where the gradient
    of one batch is largest, so that grown weights are trained before they are sent: a weight of 0 would be the first
    that a server prunes by magnitude.

    Args:
        model: The client's model.
        optimizer: Trains it; its state follows the masks.
        task: The round.
        steps: Optimizer steps of the block.
        batch: Draws a batch.
        batch_loss: Mean loss of a batch.
    """
    counts = task.counts
    if counts is None or not task.asked.masks:
        yield
        return
    taken = 0

    def after_step(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken == max(steps // 2, 1):
            with torch.enable_grad():
                found = growth_candidates(model, batch_loss, [batch()], k=counts)
            adjust(model, found, counts)

    handle = optimizer.register_step_post_hook(after_step)
    try:
        yield
    finally:
        handle.remove()
