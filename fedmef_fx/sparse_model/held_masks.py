"""Masks hold whatever writes to a weight: optimizers that are not elementwise, noise on gradients, code from outside.

Graphs and hooks mask gradients, which keeps elementwise optimizers from moving a masked weight. Much else moves it: a
matrix optimizer (Muon, Shampoo), noise that is added to gradients, an initialisation, weights that are copied back from
an average, merged or clipped. Nobody is told when a tensor is written to, so masked weights become 0 again

1. after each step of an optimizer: those of its parameters that have masks;
2. before Python code or an opaque module reads them: at each call of the model, and of the modules that hold them;
3. before they leave the model: in state dictionaries, files, frozen models, and what `masks` and `density` tell.

A graph reads a weight through its mask, so that it sees 0 whatever stands there.
"""

import dataclasses
import functools
import re
import weakref
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.tracers import uncompiled
from fedmef_fx.sparse_model.masked_parameter import bitmap_name, clear_masked, mask_name

__all__ = ["clear_below", "clear_if_written", "hold_mask", "was_stepped", "watch_steps"]


@dataclasses.dataclass(slots=True, eq=False)
class _Held:
    """Where a parameter with a mask stands.

    Attributes:
        owner: Its module, weakly: the registry must not keep a model alive.
        leaf: Its name there.
        cleared: Its address and version when it was last 0 where masked.
        stepped: Whether an optimizer ever moved it.
    """

    owner: "weakref.ref[nn.Module]"
    leaf: str
    cleared: tuple[int, int] | None = None
    stepped: bool = False

    def mask(self) -> Tensor | None:
        """The mask as it is now: `.to()` puts another tensor in its place. None where the weight is packed."""
        owner = self.owner()
        return None if owner is None else owner._buffers.get(mask_name(self.leaf))


_MATRICES: Final = re.compile("muon|shampoo|soap|scion|dion|psgd|kron|kfac|galore", re.IGNORECASE)
"""Names of optimizers whose steps depend on the rows and columns of a weight."""
_HELD: Any = WeakIdKeyDictionary()  # parameter -> _Held; torch leaves its methods unannotated


def hold_mask(owner: nn.Module, leaf: str) -> None:
    """Let a parameter's mask hold from now on; a parameter that is held already costs a look-up.

    Args:
        owner: The module that has the parameter and its mask.
        leaf: The parameter's name there.
    """
    parameter = owner._parameters.get(leaf)
    if parameter is None:
        return
    held: _Held | None = _HELD.get(parameter)
    if held is None or held.owner() is None:
        _HELD[parameter] = _Held(weakref.ref(owner), leaf)


def was_stepped(parameter: nn.Parameter) -> bool:
    """Whether an optimizer has moved a parameter."""
    held = _HELD.get(parameter)
    return held is not None and bool(held.stepped)


def clear_below(module: nn.Module) -> None:
    """Set the masked weights that a module and its children hold to 0: Python code is about to read them."""
    for parameter in module.parameters():
        held = _HELD.get(parameter)
        mask = None if held is None else held.mask()
        if mask is not None:
            clear_masked(parameter, mask)


def clear_if_written(owner: nn.Module, leaf: str) -> None:
    """Set a parameter to 0 where masked if it was written to since the last time, as far as torch counts writes."""
    parameter = owner._parameters.get(leaf)
    held = None if parameter is None else _HELD.get(parameter)
    mask = None if held is None else held.mask()
    if parameter is None or held is None or mask is None:
        return
    now = (parameter.data_ptr(), parameter._version)
    if now != held.cleared:
        clear_masked(parameter, mask)
        held.cleared = now


@functools.cache
def watch_steps() -> None:
    """From now on, masked weights are 0 after each step of an optimizer; a packed one may refuse it."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@uncompiled
def _before_step(optimizer: Optimizer, *_: Any) -> None:
    kind = next((base.__name__ for base in type(optimizer).__mro__ if _MATRICES.search(base.__name__)), None)
    for group in optimizer.param_groups if kind is not None else ():
        packed = [p for p in group["params"] if group.get("use_muon", True) and _is_packed(p)]
        if packed:
            raise ConfigError(
                f"{kind}.step: got a packed weight of {packed[0].numel()} active values in a row; this optimizer works "
                "on the rows and columns of matrices. Store weights dense, "
                'fedmef_fx.Config(weight_storage="dense"), or give packed weights to an elementwise optimizer'
            )


def _is_packed(parameter: nn.Parameter) -> bool:
    held = _HELD.get(parameter)
    owner = None if held is None else held.owner()
    return owner is not None and bitmap_name(held.leaf) in owner._buffers


@uncompiled
@torch.no_grad()
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = _HELD.get(parameter)
            if held is None:
                continue
            held.stepped, mask = True, held.mask()
            if mask is not None:
                clear_masked(parameter, mask)
