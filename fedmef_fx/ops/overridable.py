"""Runtime ops are graph leaves: called with a torch.fx proxy they become one node instead of being traced into."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

__all__ = ["overridable"]

P = ParamSpec("P")
R = TypeVar("R")


def overridable(op: Callable[P, R]) -> Callable[P, R]:
    """Make a function take part in torch's override protocol, as torch's own functions do."""

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        relevant = tuple(leaf for leaf in (*args, *kwargs.values()) if hasattr(type(leaf), "__torch_function__"))
        if has_torch_function(relevant):
            overridden: R = handle_torch_function(call, relevant, *args, **kwargs)
            return overridden
        return op(*args, **kwargs)

    return call
