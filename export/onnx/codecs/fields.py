"""Fields of k bits, 0 <= k <= 8, packed so that ONNX can unpack them with one look into a table per plane.

A byte holds 8 / w fields of w bits, w = 1, 2, 4 or 8, the first in its highest bits.
A field of another width is split into planes of these widths, highest bits first: 3 = 2 + 1, 7 = 4 + 2 + 1. All planes
are padded to a multiple of 8 fields, so that they have equally many.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["PLANE_WIDTHS", "fields_of_bytes", "pack_fields", "plane_bytes", "plane_widths", "unpack_fields"]

PLANE_WIDTHS: Final = (8, 4, 2, 1)

_Bytes = NDArray[np.uint8]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a field of so many bits, highest first."""
    return tuple(width for width in PLANE_WIDTHS if bits & width)


def plane_bytes(count: int, bits: int) -> int:
    """Bytes of all planes of `count` fields of so many bits."""
    return -(-count // 8) * bits


def pack_fields(fields: NDArray[Any], bits: int) -> tuple[_Bytes, ...]:
    """Pack fields, each below 2**bits.

    Args:
        fields: `[count]`, integers.
        bits: Width, 0 to 8.

    Returns:
        One array of bytes per plane.
    """
    padded = np.zeros(-(-fields.size // 8) * 8, np.uint8)
    padded[: fields.size] = fields
    planes, below = [], bits
    for width in plane_widths(bits):
        below -= width
        plane = (padded >> below) & ((1 << width) - 1)
        shifts = np.arange(8 - width, -1, -width, dtype=np.uint8)
        planes.append(np.bitwise_or.reduce(plane.astype(np.uint8).reshape(-1, 8 // width) << shifts, axis=1))
    return tuple(plane.astype(np.uint8) for plane in planes)


def unpack_fields(planes: tuple[_Bytes, ...], bits: int, count: int) -> NDArray[np.int64]:
    """The fields of `pack_fields`, `[count]`."""
    fields = np.zeros(-(-count // 8) * 8, np.int64)
    for plane, width in zip(planes, plane_widths(bits), strict=True):
        fields = (fields << width) | fields_of_bytes(width)[plane].reshape(-1)
    return fields[:count]


def fields_of_bytes(width: int) -> _Bytes:
    """`u8[256, 8 / width]`: the fields in each byte."""
    shifts = np.arange(8 - width, -1, -width, dtype=np.uint8)
    return (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << width) - 1)
