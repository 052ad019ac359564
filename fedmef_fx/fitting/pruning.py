"""Gradual magnitude pruning with fine-tuning, and distillation from the original.

In the first part of the steps the density falls from 1 to d, at progress t as d + (1 - d)(1 - t)^3 (Zhu and Gupta,
2017): fast while there is much to spare, slowly towards the end. The rest of the steps trains what is left. The loss is
a KL(original, model) + (1 - a) L, with the original's outputs as targets beside the labels.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.config import Config
from fedmef_fx.fitting.samples import Loss, Samples
from fedmef_fx.fitting.sensitivity import divergence
from fedmef_fx.passes._coarse_masks import coarse_masks
from fedmef_fx.sparse_model.masks import masks, set_masks
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity import magnitude_masks
from fedmef_fx.transformation.transform import transform

__all__ = ["Recipe", "prunable_model", "train", "wanted_masks"]

_PRUNING: Final = 0.5  # share of the steps in which the density falls
_UPDATES: Final = 12
_ALMOST_ALL: Final = 0.999

MasksAt = Callable[[nn.Module, float], Mapping[str, Tensor]]
"""From a model and a share of what is kept in the end (1 at the start, 0 at the end) to masks."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: Of AdamW; it falls to 0 as a cosine.
        distillation: Share of the loss that is the divergence from the original.
        loss: Of the model's output and the target.
    """

    epochs: int
    learning_rate: float
    distillation: float
    loss: Loss


def prunable_model(
    model: nn.Module, *, granularity: str, example_inputs: tuple[Any, ...], channel_multiple: int
) -> nn.Module:
    """A transformed copy of a model that computes what the model computes, with masks that keep everything."""
    config = Config(
        density=_ALMOST_ALL,
        allocation="uniform",
        mask_init="magnitude",
        normalization="keep",
        activation_sparsity=0.0,
        activation_bits=None,
        weight_storage="dense",
        granularity=granularity,
        channel_multiple=channel_multiple,
    )
    sparse = transform(model, config, example_inputs=example_inputs)
    full = {name: torch.ones_like(mask) for name, mask in masks(sparse).items()}
    set_masks(sparse, full)
    with torch.no_grad():  # masks had cleared the smallest weights
        originals = dict(model.named_parameters())
        for name in full:
            sparse.get_parameter(name).copy_(originals[name])
    return sparse


def wanted_masks(shares: Mapping[str, float] | float, *, channel_multiple: int) -> MasksAt:
    """Masks of the largest magnitudes by progress.

    Args:
        shares: The share of each weight to keep in the end; a single one for channel masks.
        channel_multiple: What numbers of channels are rounded to.
    """

    def at(model: nn.Module, rest: float) -> Mapping[str, Tensor]:
        weights = {name: model.get_parameter(name).detach() for name in masks(model)}
        if isinstance(shares, float):
            prunable = transformation_of(model).prunable
            channels = {name: prunable[name].channels for name in weights}
            return coarse_masks(
                weights,
                {name: found for name, found in channels.items() if found is not None},
                granularity="channel",
                density=shares + (1 - shares) * rest,
                allocation="uniform",
                multiple=channel_multiple,
                seed=None,
            )
        counts = {
            name: max(1, round(weight.numel() * (shares[name] + (1 - shares[name]) * rest)))
            for name, weight in weights.items()
        }
        return magnitude_masks({name: weight.abs() for name, weight in weights.items()}, counts)

    return at


def train(
    sparse: nn.Module,
    original: nn.Module,
    samples: Samples,
    masks_at: MasksAt,
    recipe: Recipe,
    *,
    is_pruned: bool = False,
) -> None:
    """Prune and fine-tune a model in place; it is in eval mode when this returns.

    Args:
        sparse: The model.
        original: What it is to compute.
        samples: The data.
        masks_at: The masks by progress.
        recipe: How to train.
        is_pruned: Whether the model has almost the masks that it gets: then it gets them at once.
    """
    steps = max(1, recipe.epochs * samples.steps)
    falling = 1 if is_pruned else max(1, round(_PRUNING * steps))
    every = max(1, falling // _UPDATES)
    optimizer = torch.optim.AdamW(sparse.parameters(), recipe.learning_rate, weight_decay=0.0)
    original = original.eval()
    step = 0
    sparse.train()
    for epoch in range(recipe.epochs):
        for batch in samples.training(epoch):
            if step <= falling and (step % every == 0 or step == falling):
                set_masks(sparse, masks_at(sparse, 0.0 if is_pruned else (1 - step / falling) ** 3))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            output = sparse(*batch.inputs)
            loss = (1 - recipe.distillation) * recipe.loss(output, batch.target)
            if recipe.distillation:
                with torch.no_grad():
                    wanted = original(*batch.inputs)
                loss = loss + recipe.distillation * divergence(output, wanted)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            optimizer.step()
            step += 1
    set_masks(sparse, masks_at(sparse, 0.0))
    sparse.eval()
