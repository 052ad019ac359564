"""Loss, accuracy and metrics of a model on data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.client_data import opened
from fedmef_fx.federated.objective import LossFunction, Objective, objective_of

__all__ = ["Evaluation", "evaluate", "evaluation_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model does on data.

    Attributes:
        loss: Mean loss.
        accuracy: Share of right predictions, of samples or of positions of sequences, 0 to 1; None where targets are no
            classes, or outputs no logits.
        metrics: Means of the objective's metrics.
    """

    loss: float
    accuracy: float | None
    metrics: Mapping[str, float]


def evaluate(
    model: nn.Module, dataset: Any, *, loss_fn: LossFunction | Objective = F.cross_entropy, batch_size: int = 512
) -> tuple[float, float | None]:
    """Mean loss, and the share of correct predictions; see `evaluation_of`."""
    found = evaluation_of(model, dataset, loss_fn=loss_fn, batch_size=batch_size)
    return found.loss, found.accuracy


@torch.no_grad()
def evaluation_of(
    model: nn.Module,
    data: Any,
    *,
    loss_fn: LossFunction | Objective = F.cross_entropy,
    batch_size: int = 512,
    collate: Collate | None = None,
) -> Evaluation:
    """Evaluate a model.

    Args:
        model: The model; it is put into eval mode.
        data: What `opened` takes, not empty.
        loss_fn: Mean loss of a batch of outputs and targets, or an objective.
        batch_size: Samples per batch, where the data do not say.
        collate: Makes a batch of items; None for what torch's loaders do.

    Raises:
        ConfigError: No samples.
    """
    model.eval()
    objective, device = objective_of(loss_fn), next(model.parameters()).device
    total, samples, right, places = 0.0, 0, 0, 0
    sums = dict.fromkeys(objective.metrics, 0.0)
    is_classification = True
    for batch in opened(data, collate=collate).batches(batch_size=batch_size, shuffle=False, device=device):
        found = objective.evaluate(model, batch)
        total += found.loss * found.samples
        samples += found.samples
        is_classification = is_classification and found.right is not None
        right, places = right + (found.right or 0), places + found.places
        sums = {name: value + found.metrics[name] * found.samples for name, value in sums.items()}
    if not samples:
        raise ConfigError("evaluate: got data without samples; expected at least one")
    accuracy = right / places if is_classification and places else None
    return Evaluation(total / samples, accuracy, {name: value / samples for name, value in sums.items()})
