"""Blocks without gradients, as pairs of operations: torch.fx drops the context managers of the code it traces."""

from typing import Final

import torch
from torch import fx

__all__ = ["enter_grad_mode", "leave_grad_mode"]


def enter_grad_mode(enabled: bool) -> bool:
    """Switch the recording of gradients; returns whether it was on before, for `leave_grad_mode`."""
    previous = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    return previous


def leave_grad_mode(previous: bool) -> None:
    """Switch back to what `enter_grad_mode` found."""
    torch.set_grad_enabled(previous)


# Nothing reads what they return: dead code elimination has to keep them all the same.
_IMPURE: Final = [fx.node.has_side_effect(enter_grad_mode), fx.node.has_side_effect(leave_grad_mode)]
