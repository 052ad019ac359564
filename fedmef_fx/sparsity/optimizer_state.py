"""Topology changes keep optimizers valid: the state of coordinates that were pruned or grown is forgotten.

A momentum buffer that survives the pruning of its weight would move the weight away from 0 at the next step. The
model does not know the optimizers that train it, so parameters whose topology changed wait here until an optimizer
that holds them takes its next step; just before it, the state of their changed coordinates is set to 0. The state of a
packed parameter, whose number of values may have changed, is moved to the places that its survivors have now.

A process that never changes a topology has no hook on its optimizers; afterwards the hook costs one comparison per
step. A parameter in two optimizers is treated in the one that steps first.
"""

import dataclasses
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

__all__ = ["Move", "forget_state", "move_state"]


class _Change(Protocol):
    """What a topology change does to tensors that have one number per coordinate."""

    def applies_to(self, value: Tensor) -> bool:
        """Whether a tensor has one number per coordinate: step counters and factored statistics have not."""

    def on(self, value: Tensor) -> Tensor:
        """The tensor after the change; may be the same object."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Keep:
    """Coordinates outside of a mask become 0.

    Attributes:
        mask: Boolean, of the parameter's shape.
    """

    mask: Tensor

    def applies_to(self, value: Tensor) -> bool:
        """See `_Change`."""
        return value.shape == self.mask.shape

    def on(self, value: Tensor) -> Tensor:
        """See `_Change`; in place."""
        return value.mul_(self.mask.to(value.device))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Move:
    """From the active values of one mask to those of another.

    Attributes:
        survives: Boolean `[active before]`: values that stay.
        place: Boolean `[active after]`, with as many set: where they go; the others are new and start at 0.

    Example:
        >>> old, new = torch.tensor([True, True, False]), torch.tensor([False, True, True])
        >>> Move.between(old, new).on(torch.tensor([1.0, 2.0]))
        tensor([2., 0.])
    """

    survives: Tensor
    place: Tensor

    @classmethod
    def between(cls, old: Tensor, new: Tensor) -> "Move":
        """The move from one mask to another of the same shape."""
        both = old & new
        return cls(both[old], both[new])

    def applies_to(self, value: Tensor) -> bool:
        """See `_Change`."""
        return value.shape == self.survives.shape

    def on(self, value: Tensor) -> Tensor:
        """See `_Change`; a new tensor."""
        moved = value.new_zeros(self.place.shape)
        moved[self.place.to(value.device)] = value[self.survives.to(value.device)]
        return moved


class _Waiting:
    """Parameters whose optimizer state has to change at the next step, held weakly."""

    def __init__(self) -> None:
        self._changes: dict[int, tuple[weakref.ref[nn.Parameter], list[_Change]]] = {}
        self._registered = False

    def add(self, parameter: nn.Parameter, change: _Change) -> None:
        key = id(parameter)
        known = self._changes.get(key)
        earlier = known[1] if known is not None and known[0]() is parameter else []
        reference = weakref.ref(parameter, lambda _: self._changes.pop(key, None))
        self._changes[key] = (reference, [*earlier, change])
        if not self._registered:
            # For good: torch iterates over these hooks while it calls them, so they cannot remove themselves.
            register_optimizer_step_pre_hook(self._before_step)
            self._registered = True

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._changes:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._changes:
                    continue
                reference, changes = self._changes[id(parameter)]
                found = reference()
                if found is None or found is not parameter:
                    continue
                _apply(changes, optimizer.state[found])
                del self._changes[id(parameter)]


def _apply(changes: list[_Change], state: dict[Any, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, Tensor) or not changes[0].applies_to(value):
            continue
        for change in changes:
            value = change.on(value)  # noqa: PLW2901 -- the changes follow one another
        state[name] = value


_WAITING = _Waiting()


def forget_state(parameter: nn.Parameter, *, keep: Tensor) -> None:
    """Zero the optimizer state of some coordinates of a parameter before the next optimizer step.

    Args:
        parameter: A parameter whose topology changed.
        keep: Boolean, of its shape: coordinates that keep their state.
    """
    _WAITING.add(parameter, _Keep(keep.clone()))


def move_state(parameter: nn.Parameter, move: Move) -> None:
    """Move the optimizer state of a packed parameter before the next optimizer step.

    Args:
        parameter: A packed parameter whose topology changed; it has the values of the new one already.
        move: From the old topology to the new one.
    """
    _WAITING.add(parameter, move)
