"""What a transformed model knows about itself: its prunable parameters, masks, coverage and pass reports.

A transformation adds two things to a model's module tree: next to each masked parameter `weight` a boolean buffer
`weight_mask`, or a bitmap `weight_bitmap` where the weight is packed (`masked`), and one child module `fedmef`
(`Transformation`) with the configuration and the prunable parameters. Both travel with `deepcopy`, `.to()` and
`state_dict`; nothing else is needed to train on.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError
from fedmef_fx.module_tree import owner_of
from fedmef_fx.sparse_model.channels import zero_dead_channels
from fedmef_fx.sparse_model.copies import check_copy
from fedmef_fx.sparse_model.masked_parameter import MaskedParameter, bitmap_name, clear_masked, mask_name
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = [
    "MaskedParameter",
    "apply_masks",
    "bitmap_name",
    "clear_masked_weights",
    "density",
    "mask_name",
    "masks",
    "set_masks",
]


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a transformed model: original parameter name -> boolean tensor, True = active.

    The tensors are copies; `set_masks` changes a model's masks. Empty when the density is 1.
    """
    parameters = masked_parameters(model)
    clear_masked_weights(model)
    return {
        name: parameter.mask if parameter.is_packed else parameter.mask.clone()
        for name, parameter in parameters.items()
    }


def density(model: nn.Module) -> float:
    """Active share of the prunable weights that have masks, 0 to 1; 1 when there are no masks."""
    parameters = masked_parameters(model).values()
    clear_masked_weights(model)
    total = sum(parameter.numel for parameter in parameters)
    return sum(parameter.active for parameter in parameters) / total if total else 1.0


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Change the topology of a transformed model in place, without tracing again.

    Weights that stay active keep their value, pruned and grown ones become 0. Parameters stay the same objects, and
    optimizers that hold them stay valid: the momentum of pruned and grown weights becomes 0, that of the others stays.
    A packed parameter changes its size with its number of active weights. An optimizer whose state was loaded is known
    after its first step only: load it after the model's state, and change masks later.

    Any mask is taken, whatever `Config.granularity` is; with "channel", biases of channels that are off become 0.

    Args:
        model: A transformed model.
        masks: Original parameter name -> boolean mask of its shape; parameters that are left out keep theirs.

    Raises:
        ConfigError: An unknown name, a wrong shape, or a tensor that is not boolean; nothing is changed then.
    """
    parameters = masked_parameters(model)
    for name, mask in masks.items():
        _check_mask(parameters, name, mask)
    for name, mask in masks.items():
        parameters[name].change(mask)
    zero_dead_channels(model)


def _check_mask(parameters: Mapping[str, MaskedParameter], name: str, mask: Tensor) -> None:
    if name not in parameters:
        raise ConfigError(
            f"set_masks: {name!r} has no mask in this model; masked parameters: {', '.join(parameters) or 'none'}"
        )
    expected = parameters[name].shape
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ConfigError(
            f"set_masks: {name!r}: got {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
            f"{tuple(expected)}"
        )


def apply_masks(model: nn.Module) -> None:
    """Set every masked weight to 0, e.g. after weights were written from outside."""
    clear_masked_weights(model)
    zero_dead_channels(model)


def clear_masked_weights(model: nn.Module) -> None:
    """Set every masked weight to 0, and the biases of channels that are off, even between forward and backward."""
    transformation = transformation_of(model)
    check_copy(model, transformation, transformation.prunable)
    for parameter in masked_parameters(model).values():
        parameter.clear_masked()
    for prunable in transformation.prunable.values():
        for name in prunable.channels.dependents if prunable.channels is not None else ():
            owner, leaf = owner_of(model, name)
            bias, mask = owner._parameters.get(leaf), owner._buffers.get(mask_name(leaf))
            if bias is not None and mask is not None:
                clear_masked(bias, mask)
