"""`BlockwiseTensor`: a tensor at 8 bits per element, with a scale and an offset per block of 256 elements.

For tensors that must not be pruned: inputs of normalisations and of GELU, results of softmax, operands of products.
Blocks follow the order of memory. A block with smallest value lo and largest value hi stores

    scale = (hi - lo) / 255,    code = round((x - lo) / scale),    decoded = lo + scale * code

so that data which is not centred (a softmax, a GELU's input) loses no codes to a sign it does not have.

Error of nearest rounding: |x - decoded| <= scale / 2, up to rounding in the block's own precision; 0 for a block of
equal values. Where scale falls below the smallest normal number the block decodes to lo, which is off by less than 255
such numbers. Stochastic rounding: unbiased, and off by at most scale.

NaN and infinities survive unchanged. A block that holds one has 3 codes less for its finite values: scale is
(hi - lo) / 252 over the finite ones.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, Literal

import torch
from torch import Tensor

from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.registry import announce, announce_temporary
from fedmef_fx.packing.tracers import is_traced
from fedmef_fx.packing.words import check_float

__all__ = ["BLOCK", "BlockwiseTensor", "Rounding", "blockwise_nbytes"]

BLOCK: Final = 256
"""Elements per block."""

Rounding = Literal["nearest", "stochastic"]

# Bytes of input that are worked on at a time: three temporaries of this size stay far below 1 MB, and in the cache.
_CHUNK_BYTES: Final = 1 << 18
# Elsewhere a kernel launch costs more than memory does.
_CHUNK_BYTES_ON_DEVICE: Final = 1 << 24
_LEVELS: Final = 255
_NAN, _POSITIVE, _NEGATIVE = 253, 254, 255
_FINITE_LEVELS: Final = 252


def blockwise_nbytes(numel: int, dtype: torch.dtype) -> int:
    """Bytes of a `BlockwiseTensor`: 1 per element, and scale and offset of each block.

    Args:
        numel: Number of elements.
        dtype: Of the tensor; scale and offset are float64 for float64, float32 otherwise.
    """
    return numel + -(-numel // BLOCK) * 2 * _range_dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class BlockwiseTensor:
    """A tensor at 8 bits per element; see the module docstring for format and error.

    Bytes: n + 8 * ceil(n / 256), 1.03 per element against 4 in float32.

    Attributes:
        codes: uint8 `[n]`, in the order of memory of the tensor.
        ranges: `[ceil(n / 256), 2]`, offset and scale of each block.
        layout: Shape and memory order to restore.
        dtype: Dtype to restore.
        has_exceptions: Whether any block holds NaN or an infinity, or a range that overflows.

    Example:
        >>> kept = BlockwiseTensor.encode(torch.tensor([0.0, 0.25, 1.0]))
        >>> kept.unpack(), kept.nbytes
        (tensor([0.0000, 0.2510, 1.0000]), 11)
    """

    codes: Tensor
    ranges: Tensor
    layout: MemoryLayout
    dtype: torch.dtype
    has_exceptions: bool = False

    def __post_init__(self) -> None:
        announce(self.codes, "8-bit")
        announce(self.ranges, "8-bit")

    @classmethod
    def encode(
        cls, x: Tensor, *, rounding: Rounding = "nearest", generator: torch.Generator | None = None
    ) -> "BlockwiseTensor":
        """Encode a tensor; on meta and fake tensors the buffers have the right sizes and no content.

        Args:
            x: Any shape and strides; float16, bfloat16, float32 or float64.
            rounding: To the nearest code, or at random to one of the two around it, without bias.
            generator: Of stochastic rounding; None for torch's default one.

        Raises:
            ConfigError: Another dtype.
        """
        check_float(x.dtype)
        layout = MemoryLayout.of(x)
        codes = x.new_empty(layout.numel, dtype=torch.uint8, requires_grad=False)
        ranges = x.new_empty(-(-layout.numel // BLOCK), 2, dtype=_range_dtype(x.dtype), requires_grad=False)
        if has_no_values(x) and not is_traced():
            # Of a tensor with gaps, a copy of some rows and the chunk that they are gathered in.
            gathered = 0 if layout.describes(x) else 2 * _chunk_nbytes(x, x.dtype)
            announce_temporary(gathered + _chunk_nbytes(x, ranges.dtype))
            return cls(codes, ranges, layout, x.dtype)
        has_exceptions, start = False, 0
        with torch.no_grad():
            for chunk in _chunks(x.detach(), layout):
                stop = start + chunk.numel()
                for values, out, into in _in_blocks(chunk, codes[start:stop], ranges[start // BLOCK :]):
                    has_exceptions |= _encode(values, out, into, rounding=rounding, generator=generator)
                start = stop
        return cls(codes, ranges, layout, x.dtype, has_exceptions)

    def unpack(self) -> Tensor:
        """The decoded tensor, in the shape, dtype, device and memory order of the encoded one."""
        dense = self.codes.new_empty_strided(self.layout.shape, self.layout.stride, dtype=self.dtype)
        if has_no_values(dense) and not is_traced():
            if dense.dtype != self.ranges.dtype:  # decoded elsewhere, and then rounded
                announce_temporary(_chunk_nbytes(dense, self.ranges.dtype))
            return dense
        flat, step = self.layout.flatten(dense), _chunk_elements(dense)
        for start in range(0, flat.numel(), step):
            stop = start + step
            parts = _in_blocks(flat[start:stop], self.codes[start:stop], self.ranges[start // BLOCK :])
            for values, codes, ranges in parts:
                _decode(codes, ranges, values, has_exceptions=self.has_exceptions)
        return dense

    @property
    def shape(self) -> torch.Size:
        """Shape of the encoded tensor."""
        return torch.Size(self.layout.shape)

    @property
    def device(self) -> torch.device:
        """Device of the encoded tensor."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and ranges."""
        return self.codes.nbytes + self.ranges.nbytes

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"BlockwiseTensor({dtype}{list(self.shape)}, {self.nbytes} bytes)"


def _range_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunk_elements(x: Tensor) -> int:
    """Elements per chunk, a multiple of the block."""
    wide = torch.promote_types(x.dtype, torch.float32).itemsize
    return (_CHUNK_BYTES if x.device.type == "cpu" else _CHUNK_BYTES_ON_DEVICE) // wide


def _chunk_nbytes(x: Tensor, dtype: torch.dtype) -> int:
    """Bytes of a temporary for one chunk, or for all of a smaller tensor."""
    return min(_chunk_elements(x), x.numel()) * dtype.itemsize


def _chunks(x: Tensor, layout: MemoryLayout) -> Iterator[Tensor]:
    """The elements of a tensor in a layout's order, in flat pieces of whole blocks (the last one may be shorter).

    A tensor with gaps is gathered piece by piece, never as a whole. A piece is valid until the next one is asked for.
    """
    step = _chunk_elements(x)
    if x.numel() == 0:
        return
    if layout.describes(x):
        flat = layout.flatten(x)
        yield from (flat[start : start + step] for start in range(0, flat.numel(), step))
        return
    staging, filled = x.new_empty(min(step, x.numel())), 0
    for piece in _rows(x, step):
        rest = piece
        while rest.numel():
            taken = rest[: staging.numel() - filled]
            staging[filled : filled + taken.numel()] = taken
            filled, rest = filled + taken.numel(), rest[taken.numel() :]
            if filled == staging.numel():
                yield staging
                filled = 0
    if filled:
        yield staging[:filled]


def _rows(x: Tensor, limit: int) -> Iterator[Tensor]:
    """The elements of a tensor in logical order, in flat pieces of at most `limit`."""
    if x.numel() <= limit:
        yield x.reshape(-1)
        return
    count = limit // (x.numel() // x.shape[0])
    for start in range(0, x.shape[0], max(count, 1)):
        yield from _rows(x[start : start + count] if count else x[start], limit)


def _in_blocks(flat: Tensor, codes: Tensor, ranges: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A chunk as `[blocks, 256]`, and what remains of it as `[1, rest]`, each with its codes and `[blocks, 2]`."""
    whole = flat.numel() // BLOCK
    end = whole * BLOCK
    if whole:
        yield flat[:end].view(whole, BLOCK), codes[:end].view(whole, BLOCK), ranges[:whole]
    if end < flat.numel():
        yield flat[end:].view(1, -1), codes[end : flat.numel()].view(1, -1), ranges[whole : whole + 1]


def _encode(x: Tensor, codes: Tensor, ranges: Tensor, *, rounding: Rounding, generator: torch.Generator | None) -> bool:
    """Encode `[blocks, size]` in place; returns whether it holds exceptions."""
    low, high = x.amin(1, keepdim=True).to(ranges.dtype), x.amax(1, keepdim=True).to(ranges.dtype)
    # Twice, so that rounding cannot carry the decoded values of the largest magnitudes to infinity either.
    if not bool(torch.isfinite(2 * high - 2 * low).all()):
        _encode_exceptions(x, codes, ranges, rounding=rounding, generator=generator)
        return True
    scale = (high - low).div_(_LEVELS)
    scale.masked_fill_(scale < torch.finfo(scale.dtype).tiny, 0.0)
    ranges[:, :1], ranges[:, 1:] = low, scale
    steps = torch.sub(x, low).mul_(scale.reciprocal_().masked_fill_(scale.isinf(), 0.0))
    codes.copy_(_rounded(steps, _LEVELS, rounding, generator))
    return False


def _rounded(steps: Tensor, levels: int, rounding: Rounding, generator: torch.Generator | None) -> Tensor:
    """Codes as floats, of which the conversion to an integer drops the fraction; in place."""
    if rounding == "nearest":
        return steps.add_(0.5)
    noise = torch.rand(steps.shape, dtype=steps.dtype, device=steps.device, generator=generator)
    return steps.add_(noise).clamp_(max=levels)


def _encode_exceptions(
    x: Tensor, codes: Tensor, ranges: Tensor, *, rounding: Rounding, generator: torch.Generator | None
) -> None:
    """Blocks with NaN or infinities, or with a range that overflows; marked by a scale with a negative sign."""
    x = x.to(torch.float64)
    finite = x.isfinite()
    low = torch.where(finite, x, math.inf).amin(1, keepdim=True)
    high = torch.where(finite, x, -math.inf).amax(1, keepdim=True)
    low = torch.where(low.isfinite(), low, 0.0)
    high = torch.where(high.isfinite(), high, 0.0)
    scale = high / _FINITE_LEVELS - low / _FINITE_LEVELS
    scale = torch.where(scale < torch.finfo(ranges.dtype).tiny, 0.0, scale)
    ranges[:, :1], ranges[:, 1:] = low, -scale
    # Halves, because the difference of the largest values would overflow.
    steps = (x / 2 - low / 2) / torch.where(scale == 0, math.inf, scale / 2)
    steps = _rounded(steps, _FINITE_LEVELS, rounding, generator).clamp_(max=_FINITE_LEVELS)
    codes.copy_(torch.where(finite, steps, 0.0))
    codes.masked_fill_(x.isnan(), _NAN).masked_fill_(x == math.inf, _POSITIVE).masked_fill_(x == -math.inf, _NEGATIVE)


def _decode(codes: Tensor, ranges: Tensor, out: Tensor, *, has_exceptions: bool) -> None:
    """Decode `[blocks, size]` into `out`."""
    low, scale = ranges[:, :1], ranges[:, 1:]
    if has_exceptions:
        marked = scale.signbit()
        # In float64 and halves: the product with a range that overflows its format must not.
        values = codes.to(torch.float64).mul_(scale.abs() / 2).add_(low / 2).mul_(2)
        values.clamp_(torch.finfo(out.dtype).min, torch.finfo(out.dtype).max)
        for code, value in ((_NAN, math.nan), (_POSITIVE, math.inf), (_NEGATIVE, -math.inf)):
            values.masked_fill_((codes == code) & marked, value)
        out.copy_(values)
    elif out.dtype == ranges.dtype:
        out.copy_(codes).mul_(scale).add_(low)
    else:
        out.copy_(codes.to(ranges.dtype).mul_(scale).add_(low))
