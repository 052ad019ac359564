"""Functions that nodes call by name, because what a graph holds is printed and pickled: what they compute."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["NAMED", "NamedFunction"]


class NamedFunction(NamedTuple):
    """A function that keeps 8 bits for its backward.

    Attributes:
        function: The function.
        by_hand: From the gradient of its result and what was kept, and its options, to the gradient of its input;
            None where torch works that out, at the kept input.
    """

    function: Callable[..., Tensor]
    by_hand: Callable[..., Tensor] | None = None

    def derivative(self, grad: Tensor, kept: Tensor, **options: Any) -> Tensor:
        """The gradient of the input, from that of the result and the kept input or result."""
        if self.by_hand is not None:
            return self.by_hand(grad, kept, **options)
        with torch.enable_grad():
            x = kept.detach().requires_grad_()
            return torch.autograd.grad(self.function(x, **options), x, grad)[0]


NAMED: Final[dict[str, NamedFunction]] = {}
"""Filled from the rows of operators, `fedmef_fx.graph.operators`."""
