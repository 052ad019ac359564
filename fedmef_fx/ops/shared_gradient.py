"""Where the backwards of two layers meet that read one tensor, or one gradient: each a place that one forward makes.

Autograd runs the backwards of a graph one after the other, in an order of its own.
"""

import torch
from torch import Tensor

from fedmef_fx.packing.tracers import is_traced

__all__ = ["SharedGradient", "Turns", "shared_gradient", "turns"]


class SharedGradient:
    """One gradient for a tensor that two layers read: the second adds to what the first made, a few samples at a time.

    Autograd would add up two as large as the tensor. It holds the first one for the tensor, whose backward waits for
    the second. Nothing else adds to it: these two are the only readers.
    """

    __slots__ = ("_gradient", "_task")

    def __init__(self) -> None:
        self._gradient: Tensor | None = None
        self._task = -1

    def leave(self, gradient: Tensor) -> None:
        """Leave the gradient that the first layer returns, to be added to."""
        if not _keeps_graph():
            self._gradient, self._task = gradient, _task()

    def take(self) -> Tensor | None:
        """What the first layer left in this backward, once; None for the first layer."""
        gradient, self._gradient = self._gradient, None
        return gradient if self._task == _task() else None


class Turns:
    """Who of two layers is the last to read a gradient that nobody else reads, as that of the sum of their results."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task = -1

    def is_last(self) -> bool:
        """Whether the other layer asked before, in this backward; false where the graph is retained."""
        is_second = self._task == _task()
        self._task = -1 if is_second else _task()
        return is_second and not _keeps_graph()


def shared_gradient() -> SharedGradient | None:
    """A new place for the gradient of a tensor; None while traced, when torch's own operations run."""
    return None if is_traced() else SharedGradient()


def turns() -> Turns | None:
    """A new place to take turns; None while traced."""
    return None if is_traced() else Turns()


def _task() -> int:
    return torch._C._current_graph_task_id()


def _keeps_graph() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()
