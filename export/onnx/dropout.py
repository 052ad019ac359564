"""Dropout that changes nothing returns its input itself, which torch.export has to know of what writes in place.

To torch.export its result is another tensor: in `y = self.dropout(x); y += 1` it would leave x as it is, which torch
changes, too. Other kinds of dropout it takes apart itself, down to what they return.
"""

from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["IdleDropoutIsInput"]

_OPERATORS: Final = ("dropout", "dropout_")  # of torch, which F.dropout calls
_OVERLOADS: Final = (torch.ops.aten.dropout, torch.ops.aten.dropout.default)


class IdleDropoutIsInput(TorchFunctionMode):
    """A block in which dropout is its input where it does not train, or drops nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        x = None
        if func is F.dropout:
            x = _of_function(*args, **kwargs)
        elif func in _OVERLOADS or (isinstance(func, BuiltinFunctionType) and func.__name__ in _OPERATORS):
            x = _of_operator(*args, **kwargs)
        return func(*args, **kwargs) if x is None else x


# With the parameters of torch's own functions; None where they drop something, or refuse a probability.
def _of_function(
    input: Tensor,  # noqa: A002 -- torch's name for it
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor | None:
    return input if 0.0 <= p <= 1.0 and (not training or p == 0.0) else None


def _of_operator(input: Tensor, p: float, train: bool) -> Tensor | None:  # noqa: A002 -- torch's name for it
    return _of_function(input, p, train)
