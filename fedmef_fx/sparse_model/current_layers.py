"""What a transformed model knows of its weights, brought up to date with the layers that it has now.

Users put other layers in the place of some, remove and move layers, wrap one in another (LoRA), or prune one with
`torch.nn.utils.prune`. What is known of a weight then

1. goes with its layer to the name that it has now, mask included;
2. goes to the parameter `<name>_orig`, where `torch.nn.utils.prune` pruned it further: what either mask prunes is off;
3. is dropped where the weight is gone. A new layer is dense, and so counts a weight that was parametrized since.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bitmap import bitmap_nbytes
from fedmef_fx.sparse_model.masked_parameter import bitmap_name, mask_name
from fedmef_fx.sparse_model.prunable import PrunableParameter

__all__ = ["adopt_pruned", "is_current", "renamed"]


class _Masked(NamedTuple):
    """A weight with a mask or bitmap next to it."""

    name: str
    parameter: nn.Parameter
    buffer: Tensor

    def fits(self, prunable: PrunableParameter) -> bool:
        """Whether it may be the weight of which something is known."""
        if self.name.rpartition(".")[2].removesuffix("_orig") != prunable.name.rpartition(".")[2].removesuffix("_orig"):
            return False
        if prunable.packed_shape is not None:
            return self.buffer.dtype == torch.uint8 and self.buffer.numel() == bitmap_nbytes(prunable.numel)
        return self.buffer.dtype == torch.bool and self.parameter.numel() == prunable.numel


def is_current(model: nn.Module, prunables: Mapping[str, PrunableParameter]) -> bool:
    """Whether every weight that is known is where it was."""
    for name, prunable in prunables.items():
        *path, leaf = name.split(".")
        owner: nn.Module | None = model
        for part in path:
            owner = owner._modules.get(part) if owner is not None else None
        parameter = None if owner is None else owner._parameters.get(leaf)
        if owner is None or parameter is None:
            return False
        if prunable.packed_shape is None and parameter.numel() != prunable.numel:
            return False
        if prunable.masked and _buffer_of(owner, leaf) is None:
            return False
    return True


def renamed(model: nn.Module, prunables: Mapping[str, PrunableParameter]) -> dict[str, PrunableParameter]:
    """What is known of the weights of a model, by the names that they had -> with those that they have now.

    Args:
        model: The model as it is now; what `torch.nn.utils.prune` pruned gets a mask of ours.
        prunables: What was known, by name.

    Returns:
        Former name -> what is known under the present name; without weights that are gone.
    """
    for module in model.modules():
        adopt_pruned(module)
    masked = {entry.name: entry for entry in _masked(model)}
    dense = {name: p for name, p in model.named_parameters() if name not in masked}
    found: dict[str, PrunableParameter] = {}
    taken: set[str] = set()
    waiting = []
    for name, prunable in prunables.items():
        is_there = masked[name].fits(prunable) if prunable.masked and name in masked else False
        if not prunable.masked:
            is_there = name in dense and dense[name].numel() == prunable.numel
        if is_there:
            found[name] = prunable
            taken.add(name)
        elif prunable.masked and _is_hidden(model, name):
            found[name] = prunable
        elif prunable.masked:
            waiting.append(prunable)
    for prunable in waiting:
        moved = [entry for entry in masked.values() if entry.name not in taken and entry.fits(prunable)]
        layer = prunable.name.rpartition(".")[0]
        moved.sort(key=lambda entry: not entry.name.startswith(layer))  # wrapped rather than moved elsewhere
        if moved:
            found[prunable.name] = dataclasses.replace(prunable, name=moved[0].name)
            taken.add(moved[0].name)
    return found


def _is_hidden(model: nn.Module, name: str) -> bool:
    """Whether a mask is there, but something has put its parameter away."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    if f"{leaf}_orig" in owner._parameters or parametrize.is_parametrized(owner, leaf):
        return False  # computed since, and masked where it is read
    return owner._parameters.get(leaf) is None and _buffer_of(owner, leaf) is not None


def adopt_pruned(module: nn.Module) -> None:
    """Give what `torch.nn.utils.prune` pruned further, or has left for good, a mask of ours that agrees with it.

    Raises:
        ConfigError: The weight is stored packed.
    """
    for name in module._buffers:
        leaf = name.removesuffix(bitmap_name(""))
        if leaf != name and module._parameters.get(leaf) is None:
            raise ConfigError(
                f"{type(module).__name__}.{leaf} is stored packed, as its active values only, and torch.nn.utils.prune "
                "or parametrize cannot work on that; expected a dense weight: transform the model with "
                'Config(weight_storage="dense"), or change its mask with fedmef_fx.set_masks'
            )
    for hook in module._forward_pre_hooks.values():
        leaf = getattr(hook, "_tensor_name", "") if isinstance(hook, prune.BasePruningMethod) else ""
        original, theirs = module._parameters.get(f"{leaf}_orig"), module._buffers.get(mask_name(leaf))
        if original is None or theirs is None or mask_name(f"{leaf}_orig") in module._buffers:
            continue
        mask = (theirs != 0) & (original.detach() != 0)  # ours was where weights are 0
        module.register_buffer(mask_name(f"{leaf}_orig"), mask)
        module._buffers[mask_name(leaf)] = mask.clone()
    for name in [name for name in module._buffers if name.endswith(mask_name("_orig"))]:
        leaf = name.removesuffix(mask_name("_orig"))
        if f"{leaf}_orig" not in module._parameters and module._parameters.get(leaf) is not None:
            module._buffers[mask_name(leaf)] = module._buffers.pop(name)


def _masked(model: nn.Module) -> Iterator[_Masked]:
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            buffer = None if parameter is None else _buffer_of(module, leaf)
            if parameter is not None and buffer is not None:
                yield _Masked(f"{path}.{leaf}" if path else leaf, parameter, buffer)


def _buffer_of(module: nn.Module, leaf: str) -> Tensor | None:
    buffer = module._buffers.get(mask_name(leaf))
    return module._buffers.get(bitmap_name(leaf)) if buffer is None else buffer
