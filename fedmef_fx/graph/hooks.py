"""Hooks that users put on modules."""

from collections.abc import Collection

from torch import nn

from fedmef_fx.sparse_model.gradient_masks import is_own_hook

__all__ = ["has_user_hooks"]


def has_user_hooks(module: nn.Module, *, besides: Collection[int] = ()) -> bool:
    """Whether calling a module does more than its forward does.

    Args:
        module: The module.
        besides: Identities of hooks that do not count, because the model's own code installed them.
    """
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(is_own_hook(hook) or id(hook) in besides for hook in hooks)
