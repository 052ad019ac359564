"""Booleans at one bit per element.

Element i is bit `i % 8` of byte `i // 8` (least significant first); the bits after the last element are 0. So a
bitmap of n elements takes ceil(n / 8) bytes, against n for `torch.bool` and 4 or 8 n for a list of indices.
"""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.layout import has_no_values, on_device
from fedmef_fx.packing.registry import announce_temporary
from fedmef_fx.packing.tracers import is_traced

__all__ = ["bitmap_nbytes", "check_bitmap", "count_bits", "count_rows", "pack_bits", "unpack_bits"]

# Elements that are counted fastest one by one: a few bytes more than what it takes to be clever.
_SMALL: Final = 1 << 15
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
    if is_traced():
        return _pack_on_device(flat)
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
    return (padded * _powers(flat.device)).sum(1, dtype=torch.uint8)


def _powers(device: torch.device) -> Tensor:
    """The value of each bit of a byte."""
    return on_device(torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8), device)


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
    if is_traced():
        return _unpack_on_device(bitmap, numel)
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
    # In operators that ONNX has, for exporters.
    return torch.bitwise_and(bitmap[:, None], _powers(bitmap.device)).view(-1)[:numel].bool()


def count_bits(bitmap: NDArray[np.uint8]) -> int:
    """Number of set bits of contiguous bytes."""
    if not hasattr(np, "bitwise_count"):  # before numpy 2
        return int(_SET_BITS[bitmap].sum(dtype=np.int64))
    whole = bitmap.size // 8 * 8  # as words: an eighth of the numbers to add up
    counts = np.bitwise_count(bitmap[:whole].view(np.uint64)), np.bitwise_count(bitmap[whole:])
    return sum(int(part.sum(dtype=np.int64)) for part in counts if part.size)


def _set_bits(bitmap: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Number of set bits of each byte."""
    if not hasattr(np, "bitwise_count"):  # before numpy 2
        return _SET_BITS[bitmap]
    counts: NDArray[np.uint8] = np.bitwise_count(bitmap)
    return counts


def count_rows(bitmap: Tensor, rows: int, row_numel: int) -> Tensor:
    """Number of set bits in each row of a matrix `[rows, row_numel]`, without making the matrix.

    Args:
        bitmap: Of the matrix, in row-major order.
        rows: Number of rows.
        row_numel: Elements per row.

    Returns:
        int64 `[rows]` on the device of `bitmap`.

    Raises:
        ConfigError: The bitmap is not one of the matrix.

    Example:
        >>> count_rows(pack_bits(torch.tensor([[True, False, True], [False, False, True]])), 2, 3)
        tensor([2, 1])
    """
    check_bitmap(bitmap, rows * row_numel)
    if rows * row_numel <= _SMALL:
        return unpack_bits(bitmap, rows * row_numel).view(rows, row_numel).sum(1)
    counts = torch.from_numpy(_set_bits(bitmap.cpu().numpy()))  # one byte per 8 elements
    if row_numel % 8 == 0:
        return counts.view(rows, -1).sum(1, dtype=torch.int64).to(bitmap.device)
    # Rows begin inside of bytes: the set bits before a bit are those of the bytes before, and of its byte's lower bits.
    before = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    edges = torch.arange(rows + 1) * row_numel
    at = edges // 8
    own = F.pad(bitmap.cpu(), (0, 1))[at].numpy() & ((1 << (edges % 8)) - 1).to(torch.uint8).numpy()
    return (before[at] + torch.from_numpy(_set_bits(own))).diff().long().to(bitmap.device)
