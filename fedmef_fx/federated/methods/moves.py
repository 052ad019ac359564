"""What policies share when they have chosen: new masks in place, and masks from scores of all weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmef_fx.sparse_model.masks import masks, set_masks
from fedmef_fx.sparsity.selection import largest_positions

__all__ = ["change_masks", "highest_overall"]


def change_masks(
    model: nn.Module, chosen: Mapping[str, Tensor], *, before: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """Give a model new masks; grown weights are 0.

    Args:
        model: A transformed model, changed in place.
        chosen: Parameter name -> mask of its shape.
        before: What growth is counted against; None for the masks that the model has.

    Returns:
        Parameter name -> number of weights that were grown.
    """
    old = masks(model) if before is None else before
    set_masks(model, chosen)
    return {name: int((mask.cpu() & ~old[name].cpu()).count_nonzero()) for name, mask in chosen.items()}


def highest_overall(
    scores: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, active: int
) -> dict[str, Tensor]:
    """Masks of the weights with the highest scores, of all layers together.

    Args:
        scores: Parameter name -> a score of every weight, `[numel]`.
        shapes: Parameter name -> shape of its mask.
        active: How many weights; of equal scores the earlier layer and position wins.
    """
    together = torch.cat([scores[name] for name in shapes])
    chosen = torch.zeros(together.numel(), dtype=torch.bool)
    chosen[largest_positions(together, active)] = True
    parts = torch.split(chosen, [shape.numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
