"""Masks where no graph applies them: in front of Python code, opaque modules and optimizers.

A weight that a graph reads goes through its mask there. Python code and opaque modules (nn.LSTM, a fallback for a call
that no graph serves, a weight used by hand) read the parameter itself: it is set to 0 where masked before they do, and
a hook on it keeps its gradient 0 there. What is known of a parameter, as `held_masks` and hooks on it do, is lost when
it is copied or replaced, as by `deepcopy` or `load_state_dict(assign=True)`; hooks on modules are not, so those tell it
again.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.module_tree import owner_of
from fedmef_fx.ops import gradient_collector as growth
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.tracers import is_traced, refuse_tracers, uncompiled
from fedmef_fx.sparse_model.copies import check_copy
from fedmef_fx.sparse_model.held_masks import clear_below, clear_if_written, hold_mask
from fedmef_fx.sparse_model.masked_parameter import clear_masked, mask_name
from fedmef_fx.sparse_model.parameters import refuse_sharded
from fedmef_fx.sparse_model.transformation import CHILD_NAME, Transformation, transformation_of

__all__ = ["OWN", "attach_gradient_masks", "clear_before_python", "forget_gradient_masks", "is_own_hook", "keep_masks"]


OWN: Final = "is_own_hook_of_fedmef_fx"
"""An attribute that hooks have which only listen."""


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


def keep_masks(model: nn.Module, *, runs_python: bool) -> None:
    """Let the masks of a transformed model hold, also after copies of it are made.

    Args:
        model: The model.
        runs_python: Whether its own forward runs in Python code, which may read any weight.
    """
    transformation = transformation_of(model)
    prunables = transformation.prunable
    transformation.bare = tuple(
        name
        for name in transformation.guarded
        if runs_python or name not in prunables or prunables[name].tier == "hook"
    )
    for path in {name.rpartition(".")[0] for name in transformation.guarded}:
        model.get_submodule(path).register_forward_pre_hook(attach_own_gradient_masks)
    if transformation.guarded:
        model.register_forward_pre_hook(attach_gradient_masks)
        _attach_all(model)
    elif any(prunable.masked for prunable in prunables.values()):
        model.register_forward_pre_hook(hold_masks)
        _hold_all(model)


def _hold_all(model: nn.Module) -> None:
    if is_traced():
        return
    transformation = _known(model)
    masked = (name for name, prunable in transformation.prunable.items() if prunable.masked)
    for owner, leaf in _present(model, (*masked, *transformation.guarded)):
        refuse_sharded(leaf, owner._parameters.get(leaf), owner, model)
        hold_mask(owner, leaf)
    check_copy(model, transformation, transformation.prunable)


def _attach_all(model: nn.Module) -> None:
    refuse_tracers(model)
    if is_traced():  # its parameters stand in for the model's
        return
    transformation = _known(model)
    for owner, leaf in _present(model, transformation.guarded):
        _attach(owner, leaf)
    _hold_all(model)
    for owner, leaf in _present(model, transformation.bare):
        parameter, mask = owner._parameters.get(leaf), owner._buffers.get(mask_name(leaf))
        if isinstance(parameter, nn.Parameter) and mask is not None and not has_no_values(parameter):
            clear_masked(parameter, mask)


# The hooks. Whatever is uncompiled imports torch's compiler when it is first called, which takes a second.
@uncompiled
def hold_masks(model: nn.Module, _: Any = None) -> None:
    """Let the masks of a transformed model hold from now on."""
    _hold_all(model)


@uncompiled
def attach_gradient_masks(model: nn.Module, _: Any = None) -> None:
    """Prepare the masked parameters of a transformed model for a call of it."""
    _attach_all(model)


def _present(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[nn.Module, str]]:
    """Owner and name of each parameter whose layer is not gone."""
    for name in names:
        try:
            yield owner_of(model, name)
        except AttributeError:
            continue


def _known(model: nn.Module) -> Transformation:
    """What a model knows, without looking for changed layers, which the calls of regions do."""
    child = model.get_submodule(CHILD_NAME)
    assert isinstance(child, Transformation)  # noqa: S101 -- for the type checker
    return child


@uncompiled
def attach_own_gradient_masks(module: nn.Module, _: Any = None) -> None:
    """Prepare the masked parameters that a module itself holds for a call of it."""
    if is_traced():
        return
    for leaf in module._parameters:
        if mask_name(leaf) in module._buffers:
            _attach(module, leaf)
            clear_if_written(module, leaf)


def clear_before_python(module: nn.Module) -> None:
    """Set the masked weights in a module to 0 whose Python code is about to run instead of its graphs."""
    if not is_traced():
        clear_below(module)


def is_own_hook(hook: object) -> bool:
    """Whether a module's hook is one of this package's, which changes nothing that a graph has to know."""
    return hook in (attach_gradient_masks, attach_own_gradient_masks, hold_masks) or hasattr(hook, OWN)


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
