"""Topology changes keep optimizers valid: the state of coordinates that were pruned or grown is forgotten.

A momentum buffer that survives the pruning of its weight would move the weight away from 0 at the next step. A
topology change therefore sets the state of the changed coordinates to 0, and moves the state of a packed parameter,
whose number of values may have changed, to the places that its survivors have now. It does so at once and in every
optimizer that has state of the parameter. The history of an L-BFGS starts over.

The model is not told which optimizers train it. From the moment that a transformed model exists, a hook notes every
optimizer that takes a step, so that all are known whose state came about here. What an optimizer has that never took a
step was loaded into it, at a time that nobody knows. It is taken for that of the present masks if these came from a
checkpoint or a state dictionary, too; where they were changed in another way, the optimizer's step is an error.
"""

import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import LBFGS
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.tracers import uncompiled

__all__ = ["StateUpdate", "forget_state", "trust_loaded_state", "update_state", "watch_optimizers"]


class _Change(Protocol):
    """What a topology change does to tensors that have one number per coordinate."""

    def applies_to(self, value: Tensor) -> bool:
        """Whether a tensor has one number per coordinate: step counters and factored statistics have not."""

    def on(self, value: Tensor) -> Tensor:
        """The tensor after the change; may be the same object."""

    def is_lost(self, value: Tensor) -> bool:
        """Whether a tensor that it does not apply to means nothing any more."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Keep:
    """Coordinates outside of a mask become 0.

    Attributes:
        mask: Boolean, of the parameter's shape.
        before: The parameter's mask until now, where it had one.
    """

    mask: Tensor
    before: Tensor

    def applies_to(self, value: Tensor) -> bool:
        """See `_Change`; statistics of the rows or columns of a square weight are not 0 where the weight is masked."""
        if value.shape != self.mask.shape:
            return False
        is_square = value.dim() == 2 and value.shape[0] == value.shape[1]
        return not (is_square and bool((value * ~self.before.to(value.device)).any()))

    def on(self, value: Tensor) -> Tensor:
        """See `_Change`; in place."""
        return value.masked_fill_(~self.mask.to(value.device), 0.0)

    def is_lost(self, value: Tensor) -> bool:
        """See `_Change`; rows and columns stay what they were."""
        del value
        return False


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StateUpdate:
    """From the active values of one mask to those of another.

    Attributes:
        survives: Boolean `[active before]`: values that stay.
        place: Boolean `[active after]`, with as many set: where they go; the others are new and start at 0.

    Example:
        >>> old, new = torch.tensor([True, True, False]), torch.tensor([False, True, True])
        >>> StateUpdate.between(old, new).on(torch.tensor([1.0, 2.0]))
        tensor([2., 0.])
    """

    survives: Tensor
    place: Tensor

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> "StateUpdate":
        """The move from one mask to another of the same shape."""
        both = old & new
        return cls(both[old], both[new])

    def applies_to(self, value: Tensor) -> bool:
        """See `_Change`."""
        return value.shape == self.survives.shape

    def on(self, value: Tensor) -> Tensor:
        """See `_Change`; a new tensor."""
        updated = value.new_zeros(self.place.shape)
        updated[self.place.to(value.device)] = value[self.survives.to(value.device)]
        return updated

    def is_lost(self, value: Tensor) -> bool:
        """See `_Change`; one that relates active values to others, such as a preconditioner."""
        return value.dim() > 1 and self.survives.numel() in value.shape


class _Optimizers:
    """The optimizers that took a step, held weakly, and the parameters whose loaded state cannot be trusted."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._changed: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lost: weakref.WeakKeyDictionary[Optimizer, str] = weakref.WeakKeyDictionary()
        self._watching = False

    def watch(self) -> None:
        """Note from now on which optimizers take steps."""
        if not self._watching:
            register_optimizer_step_pre_hook(self._before_step)
            self._watching = True

    @torch.no_grad()
    def change(self, parameter: nn.Parameter, change: _Change) -> None:
        """Apply a change to all that known optimizers have of a parameter."""
        self.watch()
        self._changed[parameter] = True
        for optimizer in self._known:
            if isinstance(optimizer, LBFGS) and any(p is parameter for p in optimizer.param_groups[0]["params"]):
                _restart(optimizer)
        holders = [optimizer for optimizer in self._known if parameter in optimizer.state]
        # An optimizer that wraps another one may share its state with it.
        for state in {id(o.state[parameter]): o.state[parameter] for o in holders}.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and change.applies_to(value):
                    state[name] = change.on(value)
                elif isinstance(value, Tensor) and change.is_lost(value):
                    self._lost.update(dict.fromkeys(holders, name))

    def trust_loaded(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take loaded state of parameters for that of their present masks."""
        for parameter in parameters:
            if parameter in self._changed:
                del self._changed[parameter]

    @uncompiled
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if optimizer in self._lost:
            raise ConfigError(
                f"{type(optimizer).__name__}.step: its {self._lost[optimizer]!r} relates the active values of a packed "
                "weight to each other, and cannot follow the change of its mask; store weights dense, "
                'fedmef_fx.Config(weight_storage="dense"), or make a new optimizer after each change'
            )
        if optimizer in self._known:
            return
        for parameter in [p for group in optimizer.param_groups for p in group["params"] if p in self._changed]:
            state = optimizer.state.get(parameter, {})
            loaded = [name for name, value in state.items() if isinstance(value, Tensor) and value.dim()]
            if loaded:
                kind = type(optimizer).__name__
                raise ConfigError(
                    f"{kind}.step: {', '.join(loaded)} of a parameter of shape {tuple(parameter.shape)} was loaded or "
                    "copied into this optimizer, before or after the masks changed; expected state that is known to "
                    "fit the masks. To resume, load the model's state first (fedmef_fx.load or model.load_state_dict), "
                    "then the optimizer's, and change masks after a first step; to start over, make a new optimizer"
                )
        self._known.add(optimizer)


def _restart(optimizer: LBFGS) -> None:
    """Forget the history of an L-BFGS: differences of all weights in one row, which belong to the old topology."""
    optimizer.state.clear()
    optimizer._numel_cache = None


_OPTIMIZERS = _Optimizers()


def watch_optimizers() -> None:
    """Note from now on which optimizers take steps, so that topology changes can reach their state."""
    _OPTIMIZERS.watch()


def forget_state(parameter: nn.Parameter, *, keep: Tensor, before: Tensor) -> None:
    """Zero what optimizers know of some coordinates of a parameter.

    Args:
        parameter: A parameter whose topology changes.
        keep: Boolean, of its shape: coordinates that keep their state.
        before: Its mask before the change.
    """
    _OPTIMIZERS.change(parameter, _Keep(keep, before))


def update_state(parameter: nn.Parameter, update: StateUpdate) -> None:
    """Move what optimizers know of a packed parameter.

    Args:
        parameter: A packed parameter whose topology changed; it has the values of the new one already.
        update: From the old topology to the new one.
    """
    _OPTIMIZERS.change(parameter, update)


def trust_loaded_state(parameters: Iterable[nn.Parameter]) -> None:
    """Take state that optimizers load for that of the present masks, which were loaded as well."""
    _OPTIMIZERS.trust_loaded(parameters)
