"""Topology changes keep optimizers valid: the state of coordinates that were pruned or grown is forgotten.

A momentum buffer that survives the pruning of its weight would move the weight away from 0 at the next step. The
model does not know the optimizers that train it, so parameters whose topology changed wait here until an optimizer
that holds them takes its next step; just before it, the state of their changed coordinates is set to 0. A process that
never changes a topology has no hook on its optimizers; afterwards the hook costs one comparison per step. A parameter
in two optimizers is cleared in the one that steps first.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

__all__ = ["forget_state"]


class _Waiting:
    """Parameters whose optimizer state has to be cleared at the next step, held weakly."""

    def __init__(self) -> None:
        self._keep: dict[int, tuple[weakref.ref[nn.Parameter], Tensor]] = {}
        self._registered = False

    def add(self, parameter: nn.Parameter, keep: Tensor) -> None:
        key = id(parameter)
        if key in self._keep and self._keep[key][0]() is parameter:
            keep = keep & self._keep[key][1]
        self._keep[key] = (weakref.ref(parameter, lambda _: self._keep.pop(key, None)), keep)
        if not self._registered:
            # For good: torch iterates over these hooks while it calls them, so they cannot remove themselves.
            register_optimizer_step_pre_hook(self._before_step)
            self._registered = True

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._keep:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._keep:
                    continue
                reference, keep = self._keep[id(parameter)]
                found = reference()
                if found is None or found is not parameter:
                    continue
                for value in optimizer.state[found].values():
                    # Step counters and factored statistics have other shapes and no per-weight meaning.
                    if isinstance(value, Tensor) and value.shape == keep.shape:
                        value.mul_(keep.to(value.device))
                del self._keep[id(parameter)]


_WAITING = _Waiting()


def forget_state(parameter: nn.Parameter, *, keep: Tensor) -> None:
    """Zero the optimizer state of some coordinates of a parameter before the next optimizer step.

    Args:
        parameter: A parameter whose topology changed.
        keep: Boolean, of its shape: coordinates that keep their state.
    """
    _WAITING.add(parameter, keep.clone())
