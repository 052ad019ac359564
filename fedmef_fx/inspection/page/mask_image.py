"""Masks as PNG files, small enough to stand inside a page.

One weight per pixel takes 1 bit, a share of active weights 4 bits: finer steps of noise cannot be told apart by eye and
would not compress. PNG as in its specification (W3C, third edition): signature, header, palette, data, end.
"""

import base64
import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

from fedmef_fx.inspection.weights import Picture

__all__ = ["data_url", "png"]

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_INDEXED: Final = 3  # PNG's colour type for pixels that are numbers of palette entries
# From pruned to active; lightness rises throughout, so that it reads the same without colour.
_RAMP: Final = ((13, 23, 42), (16, 78, 110), (14, 141, 144), (122, 199, 143), (250, 236, 160))


def png(picture: Picture) -> bytes:
    """A mask as a PNG file."""
    bits = 1 if picture.is_exact else 4
    colours = 2**bits
    indices = np.rint(picture.levels / 255 * (colours - 1)).astype(np.uint8)
    height, width = indices.shape
    header = struct.pack(">IIBBBBB", width, height, bits, _INDEXED, 0, 0, 0)
    lines = np.insert(_packed(indices, bits), 0, 0, axis=1)  # each line starts with its filter, 0 for none
    chunks = [
        (b"IHDR", header),
        (b"PLTE", _palette(colours)),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    return _SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def data_url(picture: Picture) -> str:
    """A mask as an address that holds its own PNG file."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")


def _packed(indices: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Lines of pixels, 8/bits of them to a byte, the first one in its high bits."""
    if bits == 1:
        return np.packbits(indices, axis=1)
    even = np.pad(indices, ((0, 0), (0, indices.shape[1] % 2)))
    return (even[:, 0::2] << 4 | even[:, 1::2]).astype(np.uint8)


def _palette(colours: int) -> bytes:
    stops = np.linspace(0, 1, len(_RAMP))
    at = np.linspace(0, 1, colours)
    channels = [np.interp(at, stops, channel) for channel in np.array(_RAMP, dtype=float).T]
    entries: npt.NDArray[np.uint8] = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return entries.tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
