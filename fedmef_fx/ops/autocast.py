"""What autocast asks for on a kind of device, also on those that it does not know: tensors without memory ("meta")."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast_dtype", "under_autocast"]


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast computes in; None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def under_autocast(device: str, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """A block with autocast to a type, or without any for None; entering torch's costs as much as a small layer."""
    if dtype == autocast_dtype(device):
        return nullcontext()
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)
