"""Codes of 1, 2, 3, 4 or 8 bits in bytes, block by block.

A block of s codes of 1, 2, 4 or 8 bits is one plane of w = ceil(s * bits / 8) bytes. Code i lies in byte i mod w, from
bit bits * (i div w) on, least significant first: the codes of one byte are w elements apart, so that a plane is read
and written as whole vectors. A block of 3 bits is two planes: first the lower 2 bits of its codes, then the upper one.
Bits that belong to no code are 0.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final, Literal, get_args

from torch import Tensor

__all__ = ["BITS", "Bits", "pack_planes", "planes_nbytes", "unpack_planes"]

Bits = Literal[1, 2, 3, 4, 8]
BITS: Final[tuple[Bits, ...]] = get_args(Bits)

_PLANES: Final[Mapping[int, tuple[int, ...]]] = MappingProxyType({1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)})


def planes_nbytes(size: int, bits: Bits) -> int:
    """Bytes of one block of so many codes."""
    return sum(-(-size * plane // 8) for plane in _PLANES[bits])


def pack_planes(codes: Tensor, bits: Bits, out: Tensor) -> None:
    """Write the codes of blocks as planes.

    Args:
        codes: uint8 `[blocks, size]`, below 2 ** bits.
        bits: Per code.
        out: uint8 `[blocks, planes_nbytes(size, bits)]`.
    """
    for plane, lowest, target in _planes(codes.shape[1], bits, out):
        part = codes if len(_PLANES[bits]) == 1 else (codes >> lowest) & (2**plane - 1)
        width = target.shape[1]
        target.copy_(part[:, :width])
        for number in range(1, -(-codes.shape[1] // width)):
            piece = part[:, number * width : (number + 1) * width]
            target[:, : piece.shape[1]] |= piece << (plane * number)


def unpack_planes(packed: Tensor, size: int, bits: Bits) -> Tensor:
    """The inverse of `pack_planes`: uint8 `[blocks, size]`; for 8 bits `packed` itself."""
    if bits == 8:
        return packed
    codes = packed.new_empty(packed.shape[0], size)
    for plane, lowest, source in _planes(size, bits, packed):
        width = source.shape[1]
        for number in range(-(-size // width)):
            target = codes[:, number * width : (number + 1) * width]
            piece = (source[:, : target.shape[1]] >> (plane * number)) & (2**plane - 1)
            if lowest:
                target |= piece << lowest
            else:
                target.copy_(piece)
    return codes


def _planes(size: int, bits: Bits, packed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Each plane of blocks: its bits, the lowest of them in a code, and its bytes."""
    start, lowest = 0, 0
    for plane in _PLANES[bits]:
        stop = start + -(-size * plane // 8)
        yield plane, lowest, packed[:, start:stop]
        start, lowest = stop, lowest + plane
