"""What every forward of this package's Functions does the same: its results may be written to."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["writable_result"]


def writable_result(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of a Function whose results are no views.

    What is reshaped or sliced inside of it is one, also of memory that nobody else has, and torch refuses operations in
    place on a view that a Function returns: `y = layer(x); y += x` would fail, which an original may do. Arguments
    that are returned, marked as written to, stay what they are.
    """

    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Any:
        result = forward(ctx, *args)
        if isinstance(result, tuple):
            return tuple(_unviewed(one, args) for one in result)
        return _unviewed(result, args)

    return run


def _unviewed(result: Any, args: tuple[Any, ...]) -> Any:
    is_view = isinstance(result, Tensor) and result._is_view() and not any(result is arg for arg in args)
    return result.detach() if is_view else result
