"""Masks where no graph applies them: gradients of masked weights are masked as they arrive at the parameter.

A weight that a graph reads goes through its mask there. Python code and opaque modules (nn.LSTM, a fallback for a call
that no graph serves, a weight used by hand) read the parameter itself: it is 0 where masked, and a hook on it keeps
its gradient 0 there, so that no optimizer moves it. Hooks on parameters are lost when a parameter is copied or
replaced, as by `deepcopy` or `load_state_dict(assign=True)`; hooks on modules are not, so those put them back.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.packing.tracers import is_traced, refuse_tracers, uncompiled
from fedmef_fx.sparse_model.masks import mask_name
from fedmef_fx.sparse_model.transformation import transformation_of

__all__ = ["attach_gradient_masks", "forget_gradient_masks", "is_own_hook", "keep_gradients_masked"]


class _GradientMask:
    """The hook of one parameter."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        # Weakly: the parameter belongs to the owner, which must not be kept alive by its own parameter.
        self._owner = weakref.ref(owner)
        self._leaf = leaf

    def mask(self) -> Tensor | None:
        """The mask as it is now: `.to()` puts another tensor in its place."""
        owner = self._owner()
        return None if owner is None else owner._buffers.get(mask_name(self._leaf))

    @uncompiled
    def __call__(self, gradient: Tensor) -> Tensor:
        mask = self.mask()
        if mask is None:
            return gradient
        growth.add_candidates(mask, gradient)
        return torch.where(mask, gradient, 0.0)


def keep_gradients_masked(model: nn.Module) -> None:
    """Mask the gradients of a transformed model's guarded parameters, also after copies of the model are made."""
    guarded = transformation_of(model).guarded
    if not guarded:
        return
    for path in {name.rpartition(".")[0] for name in guarded}:
        model.get_submodule(path).register_forward_pre_hook(attach_own_gradient_masks)
    model.register_forward_pre_hook(attach_gradient_masks)
    attach_gradient_masks(model)


@uncompiled
def attach_gradient_masks(model: nn.Module, _: Any = None) -> None:
    """Put the hooks on the guarded parameters of a transformed model where they are missing."""
    refuse_tracers(model)
    if is_traced():  # its parameters stand in for the model's
        return
    for name in transformation_of(model).guarded:
        path, _, leaf = name.rpartition(".")
        _attach(model.get_submodule(path), leaf)


@uncompiled
def attach_own_gradient_masks(module: nn.Module, _: Any = None) -> None:
    """Put the hooks on the masked parameters that a module itself holds where they are missing."""
    if is_traced():
        return
    for leaf in module._parameters:
        if mask_name(leaf) in module._buffers:
            _attach(module, leaf)


def is_own_hook(hook: object) -> bool:
    """Whether a module's hook is one of this module's."""
    return hook in (attach_gradient_masks, attach_own_gradient_masks)


def forget_gradient_masks(model: nn.Module) -> None:
    """Take the hooks that put gradient masks back from all modules of a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if is_own_hook(hook):
                del module._forward_pre_hooks[key]


def _attach(owner: nn.Module, leaf: str) -> None:
    parameter = owner._parameters.get(leaf)
    if parameter is None or not parameter.requires_grad:
        return
    hooks = (parameter._backward_hooks or {}).values()
    if not any(isinstance(hook, _GradientMask) and hook.mask() is not None for hook in hooks):
        parameter.register_hook(_GradientMask(owner, leaf))  # type: ignore[no-untyped-call]  # torch's own
