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
import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.packing.bit_planes import pack_planes, planes_nbytes, unpack_planes
from fedmef_fx.packing.block_code import EIGHT_BITS, BlockCode, decode_levels, encode_levels
from fedmef_fx.packing.fused import fused_kernels
from fedmef_fx.packing.layout import MemoryLayout, has_no_values
from fedmef_fx.packing.marked_blocks import decode_marked, encode_marked, marks_exceptions
from fedmef_fx.packing.noise import noise_at, noise_key
from fedmef_fx.packing.registry import BufferKind, announce, announce_temporary
from fedmef_fx.packing.tracers import is_traced
from fedmef_fx.packing.words import check_float

__all__ = ["BlockwiseTensor"]

# Bytes of input that are worked on at a time: three temporaries of this size stay far below 1 MB, and in the cache.
_CHUNK_BYTES: Final = 1 << 18
# Elsewhere a kernel launch costs more than memory does.
_CHUNK_BYTES_ON_DEVICE: Final = 1 << 24
_KINDS: Final = (math.nan, math.inf, -math.inf)  # of kind 1, 2, 3


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
        codes = x.new_empty(code.codes_nbytes(layout.numel), dtype=torch.uint8, requires_grad=False)
        shape = (code.blocks(layout.numel), code.parameters)
        parameters = x.new_empty(shape, dtype=code.parameter_dtype(x.dtype), requires_grad=False)
        if not is_traced() and has_no_values(x):
            # Of a tensor with gaps, a copy of some rows and the chunk that they are gathered in.
            gathered = 0 if layout.describes(x) else 2 * _chunk_nbytes(x, x.dtype)
            elements = _chunk_nbytes(x, torch.uint8)
            noise = 0 if code.rounding == "nearest" else elements * _wide(x.dtype).itemsize
            announce_temporary(gathered + noise + elements * (_wide(x.dtype).itemsize + 1))  # steps, and their codes
            return cls(codes, parameters, layout, x.dtype, code)
        if code.rounding == "nearest":
            key = None
        elif key is None:
            key = noise_key(int(torch.randint(2**62, (), generator=generator)))
        with torch.no_grad():
            kinds, fused = None, fused_kernels(x, code)
            if fused is not None:
                fused.pack_blocks(layout.flatten(x), code, codes, parameters, key=key)
            elif not _encode(_chunks(x.detach(), layout), code, codes, parameters, key=key):
                _encode(_chunks(x.detach(), layout), code, codes, parameters, key=key, wide=True)
                kinds = _kinds(layout.flatten(x))
        return cls(codes, parameters, layout, x.dtype, code, kinds)

    def unpack(self) -> Tensor:
        """The decoded tensor, in the shape, dtype, device and memory order of the encoded one."""
        # The view comes last: compilers refuse to write through views with strides of their own.
        flat = self.codes.new_empty(self.layout.numel, dtype=self.dtype)
        if not is_traced() and has_no_values(flat):
            # Codes one per byte, and a chunk that is rounded afterwards.
            unpacked = 0 if self.code.bits == 8 else _chunk_nbytes(flat, torch.uint8)
            is_wide = flat.dtype == _wide(flat.dtype)
            announce_temporary(unpacked + (0 if is_wide else _chunk_nbytes(flat, _wide(flat.dtype))))
            return flat.as_strided(self.layout.shape, self.layout.stride)
        fused = None if self.has_exceptions else fused_kernels(flat, self.code)
        if fused is not None:
            fused.unpack_blocks(self.codes, self.code, self.ranges, flat)
            return flat.as_strided(self.layout.shape, self.layout.stride)
        for values, codes, parameters in self._in_blocks(flat):
            _decode(codes, self.code, parameters, values, has_exceptions=self.has_exceptions)
        if self.kinds is not None:
            kinds = unpack_planes(self.kinds.view(1, -1), flat.numel(), 2)[0]
            for kind, value in enumerate(_KINDS, start=1):
                flat.masked_fill_(kinds == kind, value)
        return flat.as_strided(self.layout.shape, self.layout.stride)

    def _in_blocks(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        step, first = _chunk_elements(flat), 0
        for start in range(0, flat.numel(), step):
            chunk = flat[start : start + step]
            yield from _in_blocks(chunk, self.code, self.codes[first:], self.ranges[start // self.code.block :])
            first += self.code.codes_nbytes(chunk.numel())

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a type are computed in."""
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


def _in_blocks(
    flat: Tensor, code: BlockCode, codes: Tensor, parameters: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A chunk as `[blocks, block]`, and what remains of it as `[1, rest]`, each with its codes and parameters."""
    whole, rest = divmod(flat.numel(), code.block)
    end, width = whole * code.block, planes_nbytes(code.block, code.bits)
    if whole:
        yield flat[:end].view(whole, -1), codes[: whole * width].view(whole, -1), parameters[:whole]
    if rest:
        last = codes[whole * width : whole * width + planes_nbytes(rest, code.bits)]
        yield flat[end:].view(1, -1), last.view(1, -1), parameters[whole : whole + 1]


def _encode(
    chunks: Iterator[Tensor], code: BlockCode, codes: Tensor, parameters: Tensor, *, key: int | None, wide: bool = False
) -> bool:
    """Encode chunk after chunk; returns False where one has exceptions, unless these are treated (`wide`)."""
    start = first = 0
    for chunk in chunks:
        noise, at = None, 0
        encode = _encode_wide if wide else encode_marked if marks_exceptions(chunk) else encode_levels
        if key is not None:
            dtype = torch.float64 if wide else _wide(chunk.dtype)
            noise = noise_at(key, start, chunk.numel(), dtype=dtype, device=chunk.device)
        for part, out, into in _in_blocks(chunk, code, codes[first:], parameters[start // code.block :]):
            share = None if noise is None else noise[at : at + part.numel()].view_as(part)
            encoded = encode(part, code, into, share)
            if encoded is None:
                return False
            pack_planes(encoded, code.bits, out)
            del encoded  # before the next chunk's are made
            at += part.numel()
        start, first = start + chunk.numel(), first + code.codes_nbytes(chunk.numel())
    return True


def _encode_wide(x: Tensor, code: BlockCode, parameters: Tensor, noise: Tensor | None) -> Tensor | None:
    """The codes of blocks with NaN, infinities or a range that overflows: of quarters in float64."""
    quarter = x.to(torch.float64) / 4
    finite = quarter.isfinite()
    low = torch.where(finite, quarter, math.inf).amin(1, keepdim=True)
    values = torch.where(finite, quarter, torch.where(low.isfinite(), low, 0.0))
    quarters = torch.empty_like(parameters)
    codes = encode_levels(values, code, quarters, noise)
    limit = torch.finfo(parameters.dtype).max
    parameters.copy_(quarters.to(torch.float64).mul_(4).clamp_(-limit, limit))
    return codes


def _kinds(flat: Tensor) -> Tensor:
    """The kind of every element, 2 bits each."""
    kinds = torch.zeros(flat.shape, dtype=torch.uint8, device=flat.device)
    for kind, found in enumerate((flat.isnan(), flat == math.inf, flat == -math.inf), start=1):
        kinds.masked_fill_(found, kind)
    packed = kinds.new_empty(1, planes_nbytes(kinds.numel(), 2))
    pack_planes(kinds.view(1, -1), 2, packed)
    return packed[0]


def _decode(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor, *, has_exceptions: bool) -> None:
    """Decode `[blocks, size]` into `out`."""
    levels = unpack_planes(codes, out.shape[1], code.bits)
    if not has_exceptions:
        decode = decode_marked if marks_exceptions(out) else decode_levels
        decode(levels, code, parameters.to(_wide(out.dtype)), out)
        return
    # In quarters: the product with a range that overflows its format must not.
    values = torch.empty(out.shape, dtype=torch.float64, device=out.device)
    decode_levels(levels, code, parameters.to(torch.float64).div_(4), values)
    limit = torch.finfo(out.dtype).max
    out.copy_(values.mul_(4).clamp_(-limit, limit))
