"""Where in its window each maximum of a pooling lies, in as few bits as that takes, instead of 8-byte indices.

A window of 2 x 2 takes 2 bits per result, one of 3 x 3 takes 4, others of up to 256 elements a byte, larger ones 4
bytes.
"""

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fedmef_fx.packing.bit_planes import BITS, Bits, pack_planes, planes_nbytes, unpack_planes

__all__ = ["Window", "in_parts", "indices", "pack_offsets", "part_size"]

# Indices take 8 bytes each, so they are worked out part by part, along the first dimension.
_PART: Final = 1 << 16


class Window(NamedTuple):
    """A pooling window, per dimension.

    Attributes:
        kernel: Its size.
        stride: Step.
        padding: Implicit -inf on both sides.
        dilation: Spacing.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def pack_offsets(index: Tensor, shape: torch.Size, window: Window) -> Tensor:
    """The offsets of maxima in their windows.

    Args:
        index: `[*results]`, of the maxima in the last dimensions of the pooled tensor.
        shape: Of that.
        window: The window.
    """
    bits, parts = _bits(window), in_parts(index)
    if bits is None:
        out = torch.empty_like(index, dtype=torch.int32)
        for part, target in zip(parts, in_parts(out), strict=True):
            target.copy_(_offsets(part, shape, window))
        return out
    sizes = [planes_nbytes(part.numel(), bits) for part in parts]
    out = index.new_empty(sum(sizes), dtype=torch.uint8)
    for part, target in zip(parts, torch.split(out, sizes), strict=True):
        offsets = _offsets(part, shape, window).to(torch.uint8)
        pack_planes(offsets.reshape(1, -1), bits, target.view(1, -1))
    return out


def indices(packed: Tensor, results: torch.Size, shape: torch.Size, window: Window) -> Iterator[Tensor]:
    """The inverse of `pack_offsets`, part after part as of `in_parts`.

    Args:
        packed: What it made.
        results: Shape of the index.
        shape: As of `pack_offsets`.
        window: As of `pack_offsets`.
    """
    bits = _bits(window)
    if bits is None:
        yield from (_indices(part, shape, window) for part in in_parts(packed))
        return
    start, step = 0, part_size(results)
    for first in range(0, max(results[0], 1), step):
        part = torch.Size((min(step, results[0] - first), *results[1:]))
        stop = start + planes_nbytes(part.numel(), bits)
        offsets = unpack_planes(packed[start:stop].view(1, -1), part.numel(), bits)
        yield _indices(offsets.view(part), shape, window)
        start = stop


def part_size(results: torch.Size) -> int:
    """Size of a part along the first dimension of the results."""
    return max(1, _PART // max(results[1:].numel(), 1))


def in_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor of the results' shape, part after part."""
    return torch.split(tensor, part_size(tensor.shape))


def _bits(window: Window) -> Bits | None:
    """Bits that say which element of a window; None for more than a byte."""
    return next((bits for bits in BITS if math.prod(window.kernel) <= 1 << bits), None)


def _offsets(index: Tensor, shape: torch.Size, window: Window) -> Tensor:
    """Where in its window each maximum lies, from its index into the input's last dimensions."""
    offset = torch.zeros_like(index)
    for axis in range(-len(window.kernel), 0):
        size = shape[axis:].numel()
        coordinate = index.remainder(size).div_(max(size // shape[axis], 1), rounding_mode="floor")
        coordinate -= _starts(index, axis, window)
        offset.mul_(window.kernel[axis]).add_(coordinate.div_(window.dilation[axis], rounding_mode="floor"))
    return offset


def _indices(offset: Tensor, shape: torch.Size, window: Window) -> Tensor:
    """The inverse of `_offsets`."""
    rest, index, place = offset.long(), torch.zeros_like(offset, dtype=torch.int64), 1
    for axis in range(-1, -len(window.kernel) - 1, -1):
        coordinate = rest.remainder(window.kernel[axis]).mul_(window.dilation[axis])
        rest = rest.div_(window.kernel[axis], rounding_mode="floor")
        index.add_((coordinate + _starts(offset, axis, window)).mul_(place))
        place *= shape[axis]
    return index


def _starts(results: Tensor, axis: int, window: Window) -> Tensor:
    """Where the windows of an axis, counted from the last, begin; shaped to broadcast over the results."""
    start = torch.arange(results.shape[axis], device=results.device) * window.stride[axis] - window.padding[axis]
    return start.view(-1, *(1,) * (-axis - 1))
