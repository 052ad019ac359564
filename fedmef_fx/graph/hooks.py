"""Hooks that users put on modules."""

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any, Final

from torch import nn
from torch.nn.utils import prune

from fedmef_fx.sparse_model.gradient_masks import is_own_hook
from fedmef_fx.sparse_model.masked_parameter import mask_name

__all__ = ["has_user_hooks", "make_plain", "silent_hooks"]

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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


@contextlib.contextmanager
def silent_hooks(owner: nn.Module) -> Iterator[None]:
    """A block in which hooks of the user inside a module are there, but do not run: what it calls is no call of theirs.

    Those of torch that compute a weight before each call still do.
    """
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    for module in owner.modules():
        if module is not owner and has_user_hooks(module):
            kept.append((module, {name: vars(module)[name] for name in _HOOKS}))
            for name in _HOOKS:
                torchs = [(k, h) for k, h in vars(module)[name].items() if type(h).__module__.startswith("torch.")]
                vars(module)[name] = OrderedDict(torchs)
            module._forward_hooks[_NO_HANDLE] = _do_nothing
    try:
        yield
    finally:
        for module, hooks in kept:
            vars(module).update(hooks)


_NO_HANDLE: Final = -1


def _do_nothing(*_: object) -> None:
    """A hook."""


def make_plain(module: nn.Module) -> None:
    """Take the hooks off a module; a weight that `torch.nn.utils.prune` computes becomes a parameter."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]  # torch's own
    for name in _HOOKS:
        vars(module)[name] = OrderedDict()


def remove_parametrizations(module: nn.Module) -> None:
    """Store what the parametrizations of a transformed layer compute, masked where it has masks.

    torch's own function would take them from all copies of the layer, too: they share a class.
    """
    stacks: Any = module._modules["parametrizations"]
    values = {name: getattr(module, name).detach().clone() for name in stacks}
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        mask = module._buffers.get(mask_name(name))
        module.register_parameter(name, nn.Parameter(value if mask is None else value * mask))
