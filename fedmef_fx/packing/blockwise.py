"""`BlockwiseTensor`: a tensor in 1, 2, 3, 4 or 8 bits per element, in blocks of the order of memory.

For what must not be pruned, and for what need not be exact: 8 bits for inputs of normalisations and of GELU, results of
softmax, operands of products; 2 for the inputs that layers keep for their weight gradients.

Layout, for kernels in other languages (`fedmef_fx.packing.block_code` has the arithmetic, in this order of operations;
float64 for float64 tensors, float32 for all others, products and sums rounded one by one):

- Elements are numbered in the order of memory (`MemoryLayout`); block b holds elements `[b * block, (b + 1) * block)`,
  the last one those that are left.
- `codes`: the planes of block 0, then those of block 1, ... (`fedmef_fx.packing.bit_planes`).
- `ranges` `[blocks, 2]`: offset and scale of each block, bfloat16 for up to 4 bits; for centroids
  `[blocks, 2 ** bits]`, the levels.
- Stochastic rounding takes the noise of an element's number (`fedmef_fx.packing.noise`) under the tensor's key:
  code = floor((x - offset) * (1 / scale) + noise), at most 2 ** bits - 1. Nearest rounding is that with noise 1/2.

NaN and infinities survive unchanged. Of a tensor that holds any, and of one with a range that overflows, the finite
elements are encoded in float64, quartered, and the kind of each element (0 finite, 1 NaN, 2 and 3 the infinities) is
kept next to the codes, in 2 bits: `kinds`, one block of planes for the whole tensor. That is so on the CPU; elsewhere,
and while traced, each block carries its exceptions itself (`fedmef_fx.packing.marked_blocks`), so that nothing waits.

Where scale falls below the smallest normal number a block decodes to its offset. Up to 4 bits, finite values of float64
beyond what bfloat16 holds become its largest ones.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.packing import native_blocks
from fedmef_fx.packing.block_code import EIGHT_BITS, BlockCode
from fedmef_fx.packing.block_operations import (
    computed_in,
    kinds_of,
    pack_blocks,
    pack_wide,
    restore_kinds,
    unpack_blocks,
    unpack_wide,
)
from fedmef_fx.packing.fused import fused_kernels
from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.marked_blocks import marks_exceptions
from fedmef_fx.packing.noise import noise_key
from fedmef_fx.packing.registry import BufferKind, announce, announce_temporary
from fedmef_fx.packing.tracers import is_traced
from fedmef_fx.packing.words import check_float

__all__ = ["BlockwiseTensor", "empty_buffers", "fused_for"]

# Bytes of input that are worked on at a time: three temporaries of this size stay far below 1 MB, and in the cache.
_CHUNK_BYTES: Final = 1 << 18
# Elsewhere a kernel launch costs more than memory does.
_CHUNK_BYTES_ON_DEVICE: Final = 1 << 24


@dataclasses.dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class BlockwiseTensor:
    """A tensor in a few bits per element; see the module docstring for its layout.

    Bytes of n elements in blocks of 256: n * bits / 8, and 4 per block (8 for 8 bits): 1.03 per element at 8 bits, 0.27
    at 2, against 4 in float32.

    Attributes:
        codes: uint8, the codes.
        ranges: `[blocks, code.parameters]`, what each block's codes stand for.
        layout: Shape and memory order to restore.
        dtype: Dtype to restore.
        code: How it was encoded.
        kinds: uint8, which elements those are; None without exceptions.

    Example:
        >>> kept = BlockwiseTensor.encode(torch.tensor([0.0, 0.25, 1.0]))
        >>> kept.unpack(), kept.nbytes
        (tensor([0.0000, 0.2510, 1.0000]), 11)
        >>> BlockwiseTensor.encode(torch.rand(1024), BlockCode(bits=2)).nbytes
        272
    """

    codes: Tensor
    ranges: Tensor
    layout: MemoryLayout
    dtype: torch.dtype
    code: BlockCode
    kinds: Tensor | None = None

    def __post_init__(self) -> None:
        kind: BufferKind = "8-bit" if self.code.bits == 8 else "packed values"
        for buffer in (self.codes, self.ranges, self.kinds):
            if buffer is not None:
                announce(buffer, kind)

    @classmethod
    def encode(
        cls,
        x: Tensor,
        code: BlockCode = EIGHT_BITS,
        *,
        key: int | None = None,
        generator: torch.Generator | None = None,
    ) -> "BlockwiseTensor":
        """Encode a tensor; on meta and fake tensors the buffers have the right sizes and no content.

        Args:
            x: Any shape and strides; float16, bfloat16, float32 or float64.
            code: How.
            key: Of the noise of stochastic rounding, 64 bits; None draws one.
            generator: That draws it; None for torch's default one.

        Raises:
            ConfigError: Another dtype.
        """
        check_float(x.dtype)
        layout = MemoryLayout.of(x)
        codes, parameters = empty_buffers(x, layout.numel, code)
        fused = fused_for(x, code)
        if not is_traced() and has_no_values(x):
            announce_temporary(_encoding_nbytes(x, layout, code, is_fused=fused is not None))
            return cls(codes, parameters, layout, x.dtype, code)
        if code.rounding == "nearest":
            key = None
        elif key is None:
            key = noise_key(int(torch.randint(2**62, (), generator=generator)))
        kinds, x = None, x.detach()
        with torch.no_grad():
            if not _pack(x, layout, code, (codes, parameters), key=key, fused=fused):
                for piece, into, start in _pieces(x, layout, code, (codes, parameters)):
                    pack_wide(piece, code, *into, key=key, start=start)
                kinds = kinds_of(layout.flatten(x))
        return cls(codes, parameters, layout, x.dtype, code, kinds)

    def unpack(self) -> Tensor:
        """The decoded tensor, in the shape, dtype, device and memory order of the encoded one."""
        # The view comes last: compilers refuse to write through views with strides of their own.
        flat = self.unpack_part(0, self.layout.numel)
        if self.kinds is not None:
            restore_kinds(self.kinds, flat)
        return flat.as_strided(self.layout.shape, self.layout.stride)

    def unpack_part(self, start: int, stop: int) -> Tensor:
        """See `KeptTensor.unpack_part`; without the exceptions."""
        flat = self.codes.new_empty(stop - start, dtype=self.dtype)
        codes, ranges = self.codes[self.code.codes_nbytes(start) :], self.ranges[start // self.code.block :]
        fused = None if self.has_exceptions else fused_for(flat, self.code)
        if not is_traced() and has_no_values(flat):
            announce_temporary(0 if fused is not None else _decoding_nbytes(flat, self.code))
        elif fused is not None:
            fused.unpack_blocks(codes, self.code, ranges, flat)
        else:
            self._unpack_by_operations(codes, ranges, flat)
        return flat

    def _unpack_by_operations(self, all_codes: Tensor, all_ranges: Tensor, flat: Tensor) -> None:
        step, is_marked = _chunk_elements(flat, self.code), marks_exceptions(flat)
        for start in range(0, flat.numel(), step):
            codes, ranges = all_codes[self.code.codes_nbytes(start) :], all_ranges[start // self.code.block :]
            if self.has_exceptions:
                unpack_wide(codes, self.code, ranges, flat[start : start + step])
            else:
                unpack_blocks(codes, self.code, ranges, flat[start : start + step], is_marked=is_marked)

    @property
    def part_grain(self) -> int:
        """See `KeptTensor.part_grain`: a block, where there are no exceptions, of which the numbers are not known."""
        return 0 if self.has_exceptions else self.code.block

    @property
    def has_exceptions(self) -> bool:
        """Whether an element is NaN or infinite, or a range overflows."""
        return self.kinds is not None

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
        """Bytes of everything that is kept."""
        return self.codes.nbytes + self.ranges.nbytes + (0 if self.kinds is None else self.kinds.nbytes)

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"BlockwiseTensor({dtype}{list(self.shape)}, {self.code.bits} bits, {self.nbytes} bytes)"


def empty_buffers(x: Tensor, numel: int, code: BlockCode) -> tuple[Tensor, Tensor]:
    """Buffers for the codes and the ranges of so many elements of the type of x, and on its device."""
    codes = x.new_empty(code.codes_nbytes(numel), dtype=torch.uint8, requires_grad=False)
    shape = (code.blocks(numel), code.parameters)
    return codes, x.new_empty(shape, dtype=code.parameter_dtype(x.dtype), requires_grad=False)


def fused_for(x: Tensor, code: BlockCode) -> ModuleType | None:
    """The kernels that code a tensor whole; those in C mark no exceptions."""
    fused = fused_kernels(x, code)
    return None if fused is native_blocks and marks_exceptions(x) else fused


def _chunk_elements(x: Tensor, code: BlockCode) -> int:
    """Elements per chunk, a multiple of the block."""
    most = _CHUNK_BYTES if x.device.type == "cpu" else _CHUNK_BYTES_ON_DEVICE
    return max(most // computed_in(x.dtype).itemsize // code.block, 1) * code.block


def _chunk_nbytes(x: Tensor, code: BlockCode, dtype: torch.dtype) -> int:
    """Bytes of a temporary for one chunk, or for all of a smaller tensor."""
    return min(_chunk_elements(x, code), x.numel()) * dtype.itemsize


def _encoding_nbytes(x: Tensor, layout: MemoryLayout, code: BlockCode, *, is_fused: bool) -> int:
    """Bytes of the temporaries of encoding."""
    # Of a tensor with gaps, a copy of some rows and the chunk that they are gathered in.
    gathered = 0 if layout.describes(x) else 2 * _chunk_nbytes(x, code, x.dtype)
    if is_fused:
        return gathered
    elements, wide = _chunk_nbytes(x, code, torch.uint8), computed_in(x.dtype).itemsize
    noise = 0 if code.rounding == "nearest" else elements * wide
    return gathered + noise + elements * (wide + 1)  # steps, and their codes


def _decoding_nbytes(flat: Tensor, code: BlockCode) -> int:
    """Bytes of the temporaries of decoding by operations: codes one per byte, a chunk that is rounded afterwards."""
    unpacked, wide = 0 if code.bits == 8 else _chunk_nbytes(flat, code, torch.uint8), computed_in(flat.dtype)
    return unpacked + (0 if flat.dtype == wide else _chunk_nbytes(flat, code, wide))


def _pack(
    x: Tensor,
    layout: MemoryLayout,
    code: BlockCode,
    into: tuple[Tensor, Tensor],
    *,
    key: int | None,
    fused: ModuleType | None,
) -> bool:
    """Encode piece after piece; returns False where one has exceptions."""
    pack = partial(pack_blocks, is_marked=marks_exceptions(x)) if fused is None else fused.pack_blocks
    for piece, own, start in _pieces(x, layout, code, into, whole=fused is not None):
        if not pack(piece, code, *own, key=key, start=start):
            return False
    return True


def _pieces(
    x: Tensor, layout: MemoryLayout, code: BlockCode, into: tuple[Tensor, Tensor], *, whole: bool = False
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], int]]:
    """The pieces of a tensor, see `_chunks`, each with its codes and ranges, and the number of its first element."""
    codes, ranges = into
    start = 0
    for piece in _chunks(x, layout, code, whole=whole):
        yield piece, (codes[code.codes_nbytes(start) :], ranges[start // code.block :]), start
        start += piece.numel()


def _chunks(x: Tensor, layout: MemoryLayout, code: BlockCode, *, whole: bool) -> Iterator[Tensor]:
    """The elements of a tensor in a layout's order, in flat pieces of whole blocks (the last one may be shorter).

    A tensor with gaps is gathered piece by piece, never as a whole; another one is one piece where that is asked for. A
    piece is valid until the next one is asked for.
    """
    step = _chunk_elements(x, code)
    if x.numel() == 0:
        return
    if layout.describes(x):
        flat = layout.flatten(x)
        step = flat.numel() if whole else step
        yield from (flat[start : start + step] for start in range(0, flat.numel(), step))
        return
    staging, filled = x.new_empty(min(step, x.numel())), 0
    for piece in _rows(x, step):
        rest = piece
        while rest.numel():
            count = min(staging.numel() - filled, rest.numel())
            staging[filled : filled + count] = rest[:count]
            filled, rest = filled + count, rest[count:]
            if filled == staging.numel():
                yield staging
                filled = 0
        del piece, rest  # or these rows would live until the next ones are there
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
