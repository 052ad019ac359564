"""Loss and accuracy of a model on a data set."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedmef_fx.federated.batches import batches, sample_count
from fedmef_fx.federated.local import LossFunction

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset[Any], *, loss_fn: LossFunction = F.cross_entropy, batch_size: int = 512
) -> tuple[float, float | None]:
    """Mean loss, and the share of correct predictions.

    Args:
        model: The model; it is put into eval mode.
        dataset: Map-style, of pairs (input, target), not empty.
        loss_fn: Mean loss of a batch of outputs and targets.
        batch_size: Samples per batch.

    Returns:
        The loss, and the accuracy from 0 to 1; None where targets are no classes, or outputs no logits
        `[batch, classes]`.
    """
    model.eval()
    device = next(model.parameters()).device
    total, correct = 0.0, 0
    is_classification = True
    for inputs, targets in batches(dataset, batch_size=batch_size, shuffle=False, device=device):
        outputs = model(inputs)
        total += float(loss_fn(outputs, targets)) * len(targets)
        is_classification = is_classification and _are_classes(outputs, targets)
        if is_classification:
            correct += int((outputs.argmax(1) == targets).sum())
    count = sample_count(dataset)
    return total / count, correct / count if is_classification else None


def _are_classes(outputs: Tensor, targets: Tensor) -> bool:
    return outputs.dim() == 2 and targets.dim() == 1 and not targets.is_floating_point()
