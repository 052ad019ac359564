"""Channels without active weights: exactly 0, biases and running means included."""

import torch
from torch import Tensor, nn

from fedmef_fx.module_tree import owner_of
from fedmef_fx.sparse_model.masked_parameter import mask_name
from fedmef_fx.sparse_model.optimizer_state import forget_state
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["least_bias", "zero_dead_channels"]


@torch.no_grad()
def zero_dead_channels(model: nn.Module) -> None:
    """Make the channels without active weights exactly 0: their biases, shifts and running means.

    A channel that comes back starts with the smallest of biases: at exactly 0 no gradient passes a ReLU, and it would
    never learn; see docs/adr/0008-channel-masks.md.
    """
    for name, prunable in transformation_of(model).prunable.items():
        if not prunable.masked or prunable.channels is None or not prunable.channels.dependents:
            continue
        alive = prunable.channels.layout.rows(masked_parameters(model)[name].mask).any(1)
        for dependent in prunable.channels.dependents:
            owner, leaf = owner_of(model, dependent)
            _zero(owner, leaf, alive)


def _zero(owner: nn.Module, leaf: str, alive: Tensor) -> None:
    tensor = getattr(owner, leaf)
    if not isinstance(tensor, nn.Parameter):
        tensor.mul_(alive)
        return
    was_alive = owner._buffers.get(mask_name(leaf))
    if was_alive is None:
        # Not persistent: it follows from the masks of the weights.
        owner.register_buffer(mask_name(leaf), alive.clone(), persistent=False)
        tensor.mul_(alive)
        return
    if torch.equal(was_alive, alive) and not tensor[~alive].any():
        return
    grown = alive & ~was_alive
    tensor.mul_(alive)
    tensor[grown & (tensor == 0)] = least_bias(tensor.dtype)
    if tensor.grad is not None:
        tensor.grad.mul_(alive & was_alive)
    forget_state(tensor, keep=alive & was_alive, before=was_alive)
    was_alive.copy_(alive)


def least_bias(dtype: torch.dtype) -> float:
    """A positive number that changes no sum but lets gradients through a ReLU."""
    return float(torch.finfo(dtype).tiny) * 2.0**20
