"""The masked parameters of a model, with their masks."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.module_tree import owner_of
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, bitmap_name, mask_name
from fedmef_fx.sparse_model.transformation import Transformation, transformation_of

__all__ = ["masked_parameters", "refuse_sharded", "register_mask"]


def register_mask(model: nn.Module, parameter: str, mask: Tensor) -> None:
    """Put a mask next to its parameter and zero what it masks.

    Args:
        model: The model that holds the parameter.
        parameter: Its name.
        mask: Boolean, of the parameter's shape; True = active.
    """
    owner, leaf = owner_of(model, parameter)
    weight = getattr(owner, leaf)
    owner.register_buffer(mask_name(leaf), mask.to(device=weight.device, dtype=torch.bool).clone())
    with torch.no_grad():
        weight.mul_(getattr(owner, mask_name(leaf)))


def refuse_sharded(name: str, *tensors_or_modules: object) -> None:
    """Raise where FSDP2 has cut a masked weight up.

    Args:
        name: Of the weight.
        tensors_or_modules: The parameter, which is whole for a moment while its model runs, and the model.

    Raises:
        ConfigError: One of them belongs to FSDP2.
    """
    kinds: tuple[Any, ...] = tuple(map(type, tensors_or_modules))
    if any(map(_is_of_fsdp2, kinds)):
        raise ConfigError(
            f"{name}: fully_shard (FSDP2) has cut this weight up, so that its mask fits no part of it; expected a "
            "whole one. Train transformed models with torch.nn.parallel.DistributedDataParallel(model), or leave "
            "the modules with masks out of fully_shard"
        )


@functools.cache
def _is_of_fsdp2(kind: Any) -> bool:
    # By name: importing the classes takes as long as all the rest.
    return any(base.__name__ in ("DTensor", "FSDPModule") for base in kind.__mro__)


def masked_parameters(model: nn.Module, *, transformation: Transformation | None = None) -> dict[str, MaskedParameter]:
    """Every masked parameter with its mask or bitmap, by original name: the live tensors, not copies.

    Args:
        model: A transformed model.
        transformation: What is known about it; None for what it has itself. A model on its way through passes has
            nothing yet.

    Raises:
        ConfigError: The model was not made by `fedmef_fx.transform`, or its weights were cut up by `fully_shard`.
    """
    found = {}
    for name, prunable in (transformation or transformation_of(model)).prunable.items():
        if not prunable.masked:
            continue
        owner, leaf = owner_of(model, name)
        parameter = getattr(owner, leaf)
        refuse_sharded(name, parameter)
        if prunable.packed_shape is None:
            found[name] = MaskedParameter(parameter, getattr(owner, mask_name(leaf)), parameter.shape)
        else:
            shape = torch.Size(prunable.packed_shape)
            found[name] = MaskedParameter(parameter, getattr(owner, bitmap_name(leaf)), shape)
    return found
