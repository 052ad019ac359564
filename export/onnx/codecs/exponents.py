"""float32 values, split: 3 bytes of sign and mantissa each, and a code of a few bits for the exponent.

Signs and mantissas of weights are noise. Exponents are not: most weights of a layer have one of three, so that 8 bits
hold about 2.5. They are numbered by how often they occur, and the numbers written as fields, in levels:

    level of w bits    r < 2**w - 1 stands for itself; 2**w - 1 says that r - (2**w - 1) stands in the next level
    last level         r < 2**w

Levels of 2, 2 and 4 bits hold 21 exponents and 0, in about 2.8 bits per value. Values of other exponents, subnormal
numbers and whatever else is no product of an integer and a normal power of two are *outliers*: kept as they are, with
their index.

A value is sign * (2**23 + mantissa) * 2**(exponent - 150), a product of which every part and the result is exact and a
normal number. Its 24 bits are stored as 16 low ones, inverted where it is negative, and 8 high ones, sign first: so
that `HIGH[high] + low` is sign * (2**23 + mantissa), without a question about the sign.
"""

import dataclasses
import itertools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmef_fx.export.onnx.codecs.fields import pack_fields, plane_bytes, unpack_fields

__all__ = [
    "HIGH",
    "ExponentCode",
    "Level",
    "SplitFloats",
    "choose_exponents",
    "exponent_entropy",
    "join_floats",
    "split_floats",
]

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]

_LEAST_EXPONENT: Final = 24  # of which 2**(exponent - 150) is a normal number
_LARGEST_EXPONENT: Final = 254  # 255 are infinities and NaN
_CODE_BITS: Final = 8  # of all levels: a code is a byte
_LEVEL_WIDTHS: Final = tuple(
    widths
    for levels in (1, 2, 3)
    for widths in itertools.product(range(1, 5), repeat=levels)
    if sum(widths) <= _CODE_BITS
)
_OUTLIER_BYTES: Final = 8
_SPLIT_BYTES: Final = 700  # of the nodes and the table of a decoder in the file
_LEVEL_BYTES: Final = 300  # of another level of it
_OUTLIERS_PAY: Final = 0.005  # of the bytes: what having outliers must save, as patching them is one more copy

_half = np.arange(128, 256) * 65536
# f32[256]: what the high byte stands for. A negative one leaves room for low bits, which count upwards.
HIGH: Final = np.concatenate([_half, -_half - 65535]).astype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class ExponentCode:
    """Numbers for exponents.

    Attributes:
        widths: Bits of each level.
        exponents: As in the bits of a float32, 24 to 254; the place of each is its number. The number after the last
            is that of 0, so they are at least one less than the levels hold.
    """

    widths: tuple[int, ...]
    exponents: tuple[int, ...]

    @property
    def name(self) -> str:
        """As in the manifest, after the name of the values: one digit per level."""
        return "e" + "".join(map(str, self.widths))

    @property
    def scales(self) -> _Floats:
        """`[len(exponents) + 1]`: what an integer of 24 bits is multiplied by, for each number."""
        powers = np.ldexp(np.float32(1), np.array(self.exponents, np.int32) - 150)
        return np.append(powers, 0).astype(np.float32)

    def numbers(self) -> NDArray[np.int32]:
        """`i32[2**sum(widths)]`: the number of an exponent, by its fields of all levels, the first in the lowest bits.

        Fields of levels that a number does not reach may be anything, so a decoder need not clear them.
        """
        fields = np.arange(1 << sum(self.widths))
        numbers, is_open = np.zeros_like(fields), np.ones_like(fields, bool)
        for width in self.widths:
            field = fields & ((1 << width) - 1)
            numbers += np.where(is_open, field, 0)
            is_open &= field == (1 << width) - 1
            fields >>= width
        return np.minimum(numbers, len(self.exponents)).astype(np.int32)


@dataclasses.dataclass(frozen=True, slots=True)
class Level:
    """Fields of a level.

    Attributes:
        width: Bits of each.
        planes: As `pack_fields` makes them.
        count: Of fields: of values on the first level; one, which is not used, and the escapes before on the others.
    """

    width: int
    planes: tuple[NDArray[np.uint8], ...]
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class SplitFloats:
    """Values in parts: of [0, v_0, v_1, ...], padded to a multiple of 8.

    Attributes:
        code: Of the exponents.
        size: Values, without the zero.
        low: `u16[padded]`.
        high: `u8[padded]`.
        levels: The exponents.
        outliers: `i32[n]`, where those stand that have no number.
        patches: `f32[n]`, what they are.
    """

    code: ExponentCode
    size: int
    low: NDArray[np.uint16]
    high: NDArray[np.uint8]
    levels: tuple[Level, ...]
    outliers: NDArray[np.int32]
    patches: _Floats

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, and of the powers of two."""
        planes = sum(plane.nbytes for level in self.levels for plane in level.planes)
        parts = (self.low, self.high, self.outliers, self.patches, self.code.scales)
        return planes + sum(part.nbytes for part in parts)


def choose_exponents(values: _Floats) -> tuple[ExponentCode, int]:
    """The code that takes the fewest bytes.

    Args:
        values: `[count]`.

    Returns:
        The code, and about how many bytes values take with it, their decoder included.
    """
    counts = np.bincount(_exponents(values), minlength=256)
    ranked = np.argsort(-counts, kind="stable")
    ranked = ranked[(ranked >= _LEAST_EXPONENT) & (ranked <= _LARGEST_EXPONENT) & (counts[ranked] > 0)]
    # reached[r] values have a number of at least r.
    reached = np.append(np.cumsum(counts[ranked][::-1])[::-1], 0)
    zeros = values.size - int(np.count_nonzero(values))
    nbytes, widths = min((_nbytes(widths, reached, values.size, zeros), widths) for widths in _LEVEL_WIDTHS)
    exponents = ranked[: _capacity(widths)].tolist()
    return ExponentCode(widths, tuple(exponents)), nbytes


def split_floats(values: _Floats, code: ExponentCode) -> SplitFloats:
    """Split values.

    Args:
        values: `[count]`, any.
        code: Of their exponents; those that it does not hold become outliers.
    """
    padded = np.zeros(-(-(values.size + 1) // 8) * 8, np.float32)
    padded[1 : values.size + 1] = values
    bits = padded.view(np.uint32)
    is_negative = bits >> 31
    low = (bits ^ (is_negative * 0xFFFF)).astype(np.uint16)
    high = (bits >> 16 & 0x7F | is_negative << 7).astype(np.uint8)
    lookup = np.full(256, -1)
    lookup[list(code.exponents)] = np.arange(len(code.exponents))
    numbers = lookup[_exponents(padded)]
    numbers[bits << 1 == 0] = len(code.exponents)
    outliers = np.flatnonzero(numbers < 0).astype(np.int32)
    numbers[numbers < 0] = 0  # the shortest
    levels = _levels(numbers, code.widths)
    return SplitFloats(code, values.size, low, high, levels, outliers, padded[outliers])


def join_floats(split: SplitFloats) -> _Floats:
    """The values of `split_floats`: the reference for the ONNX decoder, step by step as it does it."""
    scales = split.code.scales[split.code.numbers()[_joined(split.levels)]]
    values: _Floats = (HIGH[split.high] + split.low.astype(np.float32)) * scales
    values[split.outliers] = split.patches
    return values[1 : split.size + 1]


def exponent_entropy(values: NDArray[Any]) -> float:
    """Entropy of the exponents of float32 values, in bits per value."""
    counts = np.bincount(_exponents(values.astype(np.float32, copy=False).reshape(-1)))
    shares = counts[counts > 0] / max(values.size, 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # no -0


def _exponents(values: _Floats) -> _Ints:
    return (values.view(np.uint32) >> 23 & 0xFF).astype(np.int64)


def _capacity(widths: tuple[int, ...]) -> int:
    """Exponents that levels hold, besides 0."""
    return sum((1 << width) - 1 for width in widths)


def _nbytes(widths: tuple[int, ...], reached: _Ints, count: int, zeros: int) -> int:
    """Bytes of values and of their decoder.

    Outliers are written with number 0, so that they never reach a second level; 0 has the last number of all.
    """
    kept = min(_capacity(widths), reached.size - 1)
    coded, escaped, fields = 0, 0, count
    for width in widths:
        coded += plane_bytes(fields + 1, width)
        escaped += (1 << width) - 1
        fields = int(reached[min(escaped, kept)] - reached[kept]) + (zeros if kept >= escaped else 0)
    outliers = count - zeros - int(reached[0]) + int(reached[kept])
    nodes = _SPLIT_BYTES + _LEVEL_BYTES * len(widths)
    nbytes = 3 * count + coded + _OUTLIER_BYTES * outliers + 4 * (kept + 1) + nodes
    return nbytes + (int(_OUTLIERS_PAY * nbytes) if outliers else 0)


def _levels(numbers: _Ints, widths: tuple[int, ...]) -> tuple[Level, ...]:
    levels = []
    for width in widths:
        escape = (1 << width) - 1
        fields = np.minimum(numbers, escape)
        levels.append(Level(width, pack_fields(fields, width), fields.size))
        numbers = np.concatenate([[0], numbers[numbers >= escape] - escape])
    return tuple(levels)


def _joined(levels: tuple[Level, ...]) -> _Ints:
    """Fields of all levels, the first in the lowest bits."""
    level, *rest = levels
    fields = unpack_fields(level.planes, level.width, level.count)
    if not rest:
        return fields
    escapes = np.cumsum(fields == (1 << level.width) - 1)
    joined: _Ints = fields | _joined(tuple(rest))[escapes] << level.width
    return joined
