"""How blocks of elements become codes of few bits: which numbers the codes of a block stand for, and how to round.

`levels="range"`: the numbers that a block can be decoded to lie evenly between its smallest value and its largest,

    decoded = offset + scale * code,    scale = (highest - offset) / (2 ** bits - 1),

`"centroids"`: they are chosen for the block's own values, by four steps of Lloyd's algorithm (each level the mean of
the values nearest to it, `fedmef_fx.packing.centroids`). That suits values of which most lie close together; 2 ** bits
levels are stored in the place of offset and scale.

Stored in 16 bits (bfloat16: rounded, so that the range covers all values: the offset down, the scale up) for up to 4
bits a code; for 8 bits in the precision of the tensor, and at least float32.

Rounding `"nearest"` takes the nearest level, off by at most scale / 2. `"stochastic"` takes one of the two levels
around a value x, low and high, the upper one where (x - low) / (high - low) + noise >= 1: unbiased, off by at most
scale. With centroids that holds between the outermost levels; values beyond become these.
"""

import dataclasses
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.bit_planes import BITS, Bits, planes_nbytes
from fedmef_fx.packing.centroids import fit_levels, nearest_levels, random_levels

__all__ = ["EIGHT_BITS", "BlockCode", "Levels", "Rounding", "decode_levels", "encode_levels"]

Rounding = Literal["nearest", "stochastic"]
Levels = Literal["range", "centroids"]

_LARGEST: Final = torch.finfo(torch.bfloat16).max


@dataclasses.dataclass(frozen=True, slots=True)
class BlockCode:
    """A code for blocks of elements; see the module docstring.

    Attributes:
        bits: Per element: 1, 2, 3, 4 or 8.
        block: Elements per block, a positive multiple of 8.
        levels: What the codes stand for; "centroids" for up to 4 bits.
        rounding: To which of the levels around it a value goes.

    Raises:
        ConfigError: A value out of range.
    """

    bits: Bits = 8
    block: int = 256
    levels: Levels = "range"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"BlockCode.bits: got {self.bits!r}; expected one of {', '.join(map(str, BITS))}")
        if self.block < 8 or self.block % 8:
            raise ConfigError(f"BlockCode.block: got {self.block!r}; expected a positive multiple of 8, such as 256")
        for name, kind in (("levels", Levels), ("rounding", Rounding)):
            if getattr(self, name) not in get_args(kind):
                allowed = " | ".join(map(repr, get_args(kind)))
                raise ConfigError(f"BlockCode.{name}: got {getattr(self, name)!r}; expected {allowed}")
        if self.levels == "centroids" and self.bits == 8:
            raise ConfigError("BlockCode.levels: got 'centroids' with 8 bits; expected up to 4 bits, or 'range'")

    @property
    def parameters(self) -> int:
        """Numbers that are stored per block."""
        return 2 if self.levels == "range" else 2**self.bits

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Their type for tensors of some type."""
        return torch.promote_types(dtype, torch.float32) if self.bits == 8 else torch.bfloat16

    def blocks(self, numel: int) -> int:
        """Number of blocks; the last one may be shorter."""
        return -(-numel // self.block)

    def codes_nbytes(self, numel: int) -> int:
        """Bytes of the codes of so many elements."""
        whole, rest = divmod(numel, self.block)
        return whole * planes_nbytes(self.block, self.bits) + planes_nbytes(rest, self.bits)

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes of the codes of so many elements of a type, and of what their blocks store.

        Example:
            >>> BlockCode().nbytes(1024, torch.float32), BlockCode(bits=2).nbytes(1024, torch.float32)
            (1056, 272)
        """
        parameters = self.blocks(numel) * self.parameters * self.parameter_dtype(dtype).itemsize
        return self.codes_nbytes(numel) + parameters


EIGHT_BITS: Final = BlockCode()


def encode_levels(
    x: Tensor, code: BlockCode, parameters: Tensor, noise: Tensor | None, *, is_checked: bool = False
) -> Tensor | None:
    """Codes of the elements of blocks.

    Args:
        x: `[blocks, size]`, computed in float32 at least.
        code: How.
        parameters: `[blocks, code.parameters]`, of `code.parameter_dtype`; written to.
        noise: Of x's shape, for stochastic rounding; None for nearest.
        is_checked: Whether what follows is known not to be so: to ask would wait for a device.

    Returns:
        uint8 `[blocks, size]`; None where an element is not finite, or twice the difference of two of one block is not,
        so that rounding cannot carry what is decoded to infinity either.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    low, high = x.amin(1, keepdim=True).to(wide), x.amax(1, keepdim=True).to(wide)
    low.add_(0.0)  # of zeros the positive one, whichever was met first
    if not is_checked and not bool(torch.isfinite(2 * high - 2 * low).all()):
        return None
    if code.levels == "centroids":
        return _encode_centroids(x.to(wide), code, parameters, noise, ends=(low, high))
    top = 2**code.bits - 1
    divisor = low.new_full((), top)  # by a number CUDA divides less exactly
    if parameters.dtype == torch.bfloat16:
        low = _bfloat16_below(low).to(wide)
        scale = -_bfloat16_below((low - high).div_(divisor)).to(wide)
    else:
        scale = (high - low).div_(divisor)
    scale.masked_fill_(scale < torch.finfo(parameters.dtype).tiny, 0.0)
    parameters[:, :1], parameters[:, 1:] = low, scale
    inverse = scale.reciprocal_().masked_fill_(scale.isinf(), 0.0)
    steps = torch.sub(x, low).mul_(inverse).add_(0.5 if noise is None else noise)
    return steps.clamp_(0, top).to(torch.uint8)


def decode_levels(codes: Tensor, code: BlockCode, parameters: Tensor, out: Tensor) -> None:
    """Write what codes stand for.

    Args:
        codes: uint8 `[blocks, size]`.
        code: How they were made.
        parameters: `[blocks, code.parameters]`, in a type that `out` is computed in.
        out: `[blocks, size]`.
    """
    values = out if out.dtype == parameters.dtype else torch.empty_like(out, dtype=parameters.dtype)
    if code.levels == "centroids":
        torch.gather(parameters, 1, codes.long(), out=values)
    else:
        values.copy_(codes).mul_(parameters[:, 1:]).add_(parameters[:, :1])
    if values is not out:
        limit = torch.finfo(out.dtype).max  # the widened range may lie beyond a 16-bit format's
        out.copy_(values.clamp_(-limit, limit))


def _bfloat16_below(x: Tensor) -> Tensor:
    """The largest bfloat16 not above x; beyond the largest finite ones, these."""
    rounded = x.clamp(-_LARGEST, _LARGEST).to(torch.bfloat16)
    below = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    return torch.where(rounded > x, below, rounded).clamp_(min=-_LARGEST)


def _encode_centroids(
    x: Tensor, code: BlockCode, parameters: Tensor, noise: Tensor | None, *, ends: tuple[Tensor, Tensor]
) -> Tensor:
    parameters.copy_(fit_levels(x, code.bits, *ends).clamp_(-_LARGEST, _LARGEST))
    levels = parameters.to(x.dtype)
    return nearest_levels(x, levels) if noise is None else random_levels(x, levels, noise)
