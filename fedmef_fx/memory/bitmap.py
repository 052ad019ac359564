"""Booleans at one bit per element.

Element i is bit `i % 8` of byte `i // 8` (least significant first); the bits after the last element are 0. So a
bitmap of n elements takes ceil(n / 8) bytes, against n for `torch.bool` and 4 or 8 n for a list of indices.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.memory.layout import has_no_values
from fedmef_fx.memory.registry import announce_temporary

__all__ = ["bitmap_nbytes", "check_bitmap", "count_bits", "pack_bits", "unpack_bits"]

_SET_BITS = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def bitmap_nbytes(numel: int) -> int:
    """Bytes of the bitmap of `numel` elements."""
    return (numel + 7) // 8


def check_bitmap(bitmap: Tensor, numel: int) -> None:
    """Refuse a bitmap whose size does not belong to `numel` elements.

    Raises:
        ConfigError: Not uint8, or another length.
    """
    expected = bitmap_nbytes(numel)
    if bitmap.dtype != torch.uint8 or bitmap.dim() != 1 or bitmap.numel() != expected:
        raise ConfigError(
            f"bitmap: got {bitmap.dtype}{list(bitmap.shape)}; expected torch.uint8[{expected}] for {numel} elements"
        )


def pack_bits(mask: Tensor) -> Tensor:
    """One bit per element of a boolean tensor, in the order of `mask.flatten()`.

    Args:
        mask: Booleans of any shape, on any device.

    Returns:
        uint8 `[ceil(n / 8)]` on the device of `mask`.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    if mask.dtype != torch.bool:
        raise ConfigError(f"pack_bits: got {mask.dtype}; expected torch.bool, e.g. pack_bits(x > 0)")
    flat = mask.detach().reshape(-1)
    if has_no_values(flat):
        return flat.new_empty(bitmap_nbytes(flat.numel()), dtype=torch.uint8)
    if flat.device.type == "cpu":
        bitmap = torch.empty(bitmap_nbytes(flat.numel()), dtype=torch.uint8)
        announce_temporary(bitmap.nbytes)  # what packbits returns
        bitmap.numpy()[...] = np.packbits(flat.numpy(), bitorder="little")
        return bitmap
    return _pack_on_device(flat)


def _pack_on_device(flat: Tensor) -> Tensor:
    """`pack_bits` where there is no numpy; gives the same on the CPU, more slowly."""
    padded = F.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (padded * powers).sum(1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, numel: int) -> Tensor:
    """The inverse of `pack_bits`.

    Args:
        bitmap: uint8 `[ceil(numel / 8)]`.
        numel: Number of elements.

    Returns:
        bool `[numel]` on the device of `bitmap`.

    Raises:
        ConfigError: The bitmap is not one of `numel` elements.
    """
    check_bitmap(bitmap, numel)
    if has_no_values(bitmap):
        return bitmap.new_empty(numel, dtype=torch.bool)
    if bitmap.device.type == "cpu":
        mask = torch.empty(numel, dtype=torch.bool)
        announce_temporary(numel)  # what unpackbits returns
        mask.numpy().view(np.uint8)[...] = np.unpackbits(bitmap.numpy(), count=numel, bitorder="little")
        return mask
    return _unpack_on_device(bitmap, numel)


def _unpack_on_device(bitmap: Tensor, numel: int) -> Tensor:
    """`unpack_bits` where there is no numpy."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap[:, None] >> shifts) & 1).view(-1)[:numel].bool()


def count_bits(bitmap: NDArray[np.uint8]) -> int:
    """Number of set bits."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return int(np.bitwise_count(bitmap).sum(dtype=np.int64))
    return int(_SET_BITS[bitmap].sum(dtype=np.int64))
