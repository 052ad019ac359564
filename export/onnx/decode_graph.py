"""The subgraph that decodes a tensor, of standard ONNX operators (set 18 or later) with static shapes.

A runtime that folds constants computes it once, when a session is created, and then runs the same graph as that of the
dense file. The steps are those of `decode_positions` and `decode_tensor`:

    fields      FIELDS[byte]; Reshape; planes joined by Mul, Add; Slice off the padding
    Gaps        emit = field < escape;  index = CumSum(emit) * emit;  at = CumSum(steps[field]) from the end
    Rice        index = CumSum(bit) * bit;  at = CumSum(-1 - remainders[index]) from the end
    Bitmap      index = CumSum(bit) * bit
    values      [0, v_0, v_1, ...][index]: index 0 is a symbol that marks nothing
    exponents   code = field + below[CumSum(field == escape)] * 2**width;  v = (HIGH[high] + low) * scale[code];
                ScatterElements of outliers
    tensor      ScatterElements into zeros (not for Bitmap); Concat of chunks; Reshape; Mul by the scales
"""

import string
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fedmef_fx.export.onnx.codecs.exponents import HIGH, Level, SplitFloats
from fedmef_fx.export.onnx.codecs.fields import fields_of_bytes, plane_widths
from fedmef_fx.export.onnx.codecs.positions import Bitmap, Gaps, Positions, Rice
from fedmef_fx.export.onnx.codecs.tensor import Chunk, EncodedTensor

__all__ = ["DecodeGraph", "short_names"]

_LETTERS: Final = string.ascii_letters


def short_names(taken: set[str]) -> Iterator[str]:
    """Short names that are not taken: a, b, ..., Z, a0, ..."""
    number = 0
    while True:
        name, rest = _LETTERS[number % len(_LETTERS)], number // len(_LETTERS)
        while rest:
            rest -= 1
            name, rest = name + (string.digits + _LETTERS)[rest % 62], rest // 62
        number += 1
        if name not in taken:
            yield name


class DecodeGraph:
    """Nodes and initializers that decode tensors; constants are shared between them.

    Args:
        taken: Names that the surrounding graph uses.
    """

    def __init__(self, taken: set[str]) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._names = short_names(taken)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._tables: dict[int, str] = {}
        self._zeros: dict[tuple[tuple[int, ...], np.dtype[Any]], str] = {}

    def add(self, encoded: EncodedTensor, output: str) -> None:
        """Add the decoder of a tensor, which gets the name `output`."""
        is_whole = encoded.position_code is None
        flat = self._whole(encoded) if is_whole else self._concatenated(encoded)
        last = None if encoded.scale is None else self._scale(encoded)
        # The step that comes last takes the name.
        if is_whole or len(encoded.shape) == 1:
            reshaped = flat
        else:
            shape = self._constant(np.array(encoded.shape, np.int64))
            reshaped = self._op("Reshape", flat, shape, output=None if last else output)
        if last is not None:
            self._op("Mul", reshaped, last, output=output)
        elif reshaped == flat:
            self.nodes[-1].output[0] = output

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
        """A tensor of zeros."""
        key = (shape, dtype)
        if key not in self._zeros:
            value = numpy_helper.from_array(np.zeros(1, dtype))
            sizes = self._constant(np.array(shape, np.int64))
            # Without a value the standard says float32, but some runtimes take other types or refuse.
            self._zeros[key] = self._op("ConstantOfShape", sizes, value=value)
        return self._zeros[key]

    def _whole(self, encoded: EncodedTensor) -> str:
        (chunk,) = encoded.chunks
        assert not isinstance(chunk.stored, SplitFloats)  # noqa: S101 -- only sparse values are split
        stored = self._initializer(chunk.stored.reshape(encoded.shape))
        return self._op("Cast", stored, to=helper.np_dtype_to_tensor_dtype(encoded.dtype))

    def _concatenated(self, encoded: EncodedTensor) -> str:
        parts = [self._chunk(chunk, encoded.dtype) for chunk in encoded.chunks]
        if len(parts) == 1 and parts[0] not in self._zeros.values():
            return parts[0]
        # Zeros may be shared, so they get no other name.
        return self._op("Concat", *parts, axis=0)

    def _scale(self, encoded: EncodedTensor) -> str:
        assert encoded.scale is not None  # noqa: S101 -- the caller has looked
        return self._initializer(encoded.scale.reshape(-1, *[1] * (len(encoded.shape) - 1)))

    def _chunk(self, chunk: Chunk, dtype: np.dtype[Any]) -> str:
        positions = chunk.positions
        assert positions is not None  # noqa: S101 -- the caller has looked
        if positions.active == 0:
            return self.zeros((chunk.size,), dtype)
        values = self._values(chunk.stored, dtype)
        if isinstance(positions.code, Bitmap):
            return self._op("Gather", values, self._index(self._bits(positions)))
        index, at = self._gaps(positions) if isinstance(positions.code, Gaps) else self._rice(positions)
        marked = self._op("Gather", values, index)
        return self._op("ScatterElements", self.zeros((chunk.size,), dtype), at, marked)

    def _values(self, stored: NDArray[Any] | SplitFloats, dtype: np.dtype[Any]) -> str:
        """A zero and the values."""
        if isinstance(stored, SplitFloats):
            return self._joined(stored)
        values = self._initializer(np.concatenate([np.zeros(1, stored.dtype), stored]))
        return values if stored.dtype == dtype else self._op("Cast", values, to=helper.np_dtype_to_tensor_dtype(dtype))

    def _joined(self, split: SplitFloats) -> str:
        """`f32[padded]`: the values of `join_floats`."""
        low = self._op("Cast", self._initializer(split.low), to=TensorProto.FLOAT)
        high = self._op("Gather", self._constant(HIGH), self._as_index(self._initializer(split.high)))
        scales = self._op("Gather", self._constant(split.code.scales), self._constant(split.code.numbers()))
        scale = self._op("Gather", scales, self._codes(split.levels))
        values = self._op("Mul", self._op("Add", high, low), scale)
        if not split.outliers.size:
            return values
        return self._op("ScatterElements", values, self._initializer(split.outliers), self._initializer(split.patches))

    def _codes(self, levels: tuple[Level, ...]) -> str:
        """`i32[padded]`: the fields of all levels, the first in the lowest bits."""
        level, *rest = levels
        fields = self._padded_fields(level.planes, level.width)
        if not rest:
            return fields
        is_escape = self._op("Equal", fields, self._number((1 << level.width) - 1))
        below = self._op("Mul", self._codes(tuple(rest)), self._number(1 << level.width))
        return self._op("Add", fields, self._op("Gather", below, self._sums(self._as_index(is_escape))))

    def _as_index(self, values: str) -> str:
        return self._op("Cast", values, to=TensorProto.INT32)

    def _number(self, value: int) -> str:
        return self._constant(np.array(value, np.int32))

    def _gaps(self, positions: Positions) -> tuple[str, str]:
        code = positions.code
        assert isinstance(code, Gaps)  # noqa: S101 -- for the type checker
        field = self._fields(positions.planes, code.bits, positions.symbols)
        marks = self._op("Less", field, self._number(code.escape))
        return self._index(self._as_index(marks)), self._arrivals(self._op("Gather", self._constant(code.steps), field))

    def _rice(self, positions: Positions) -> tuple[str, str]:
        code = positions.code
        assert isinstance(code, Rice)  # noqa: S101 -- for the type checker
        index = self._index(self._bits(positions))
        remainders = self._fields(positions.planes, code.bits, positions.active + 1)
        steps = self._op("Sub", self._number(-1), remainders)
        return index, self._arrivals(self._op("Gather", steps, index))

    def _index(self, marks: str) -> str:
        """1, 2, ... where a symbol marks a position, 0 elsewhere."""
        return self._op("Mul", self._sums(marks), marks)

    def _arrivals(self, steps: str) -> str:
        """Negative indices: each the sum of a step and all after it."""
        return self._op("CumSum", steps, self._constant(np.array(0, np.int64)), reverse=1)

    def _sums(self, values: str) -> str:
        return self._op("CumSum", values, self._constant(np.array(0, np.int64)))

    def _bits(self, positions: Positions) -> str:
        return self._fields((positions.stream,), 1, positions.symbols)

    def _fields(self, planes: tuple[NDArray[np.uint8], ...], bits: int, count: int) -> str:
        """`i32[count]`: the fields of `unpack_fields`."""
        joined = self._padded_fields(planes, bits)
        if count % 8:
            ends = self._constant(np.array([count], np.int64))
            joined = self._op("Slice", joined, self._constant(np.array([0], np.int64)), ends)
        return joined

    def _padded_fields(self, planes: tuple[NDArray[np.uint8], ...], bits: int) -> str:
        """`i32[count]`: fields, and what pads them to a multiple of 8."""
        joined = ""
        for plane, width in zip(planes, plane_widths(bits), strict=True):
            fields = self._plane(plane, width)
            if joined:
                fields = self._op("Add", self._op("Mul", joined, self._number(1 << width)), fields)
            joined = fields
        return joined

    def _plane(self, plane: NDArray[np.uint8], width: int) -> str:
        stored = self._as_index(self._initializer(plane))
        if width == 8:
            return stored
        if width not in self._tables:
            self._tables[width] = self._as_index(self._constant(fields_of_bytes(width)))
        return self._op(
            "Reshape", self._op("Gather", self._tables[width], stored), self._constant(np.array([-1], np.int64))
        )

    def _op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or next(self._names)
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def _initializer(self, array: NDArray[Any]) -> str:
        name = next(self._names)
        self.initializers.append(numpy_helper.from_array(np.require(array, requirements="C"), name))
        return name

    def _constant(self, array: NDArray[Any]) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(array)
        return self._constants[key]
