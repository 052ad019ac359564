"""How few bytes the weights of a graph can take: bounds that a file is compared with."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from fedmef_fx.export.onnx.codecs.exponents import exponent_entropy
from fedmef_fx.export.onnx.codecs.tensor import EncodedTensor

__all__ = ["EntropyBounds", "entropy_bounds"]

_SIGN_AND_MANTISSA_BITS = 24


@dataclasses.dataclass(frozen=True, slots=True)
class EntropyBounds:
    """Bytes of all tensors: n H(d) bits for positions, in n elements of density d, and the bits of the active values.

    Attributes:
        whole: Values take all the bits of their type.
        exponents: float32 values take 24 bits and the entropy of the tensor's exponents.
    """

    whole: float
    exponents: float


def entropy_bounds(proto: ModelProto, encoded: Mapping[str, EncodedTensor]) -> EntropyBounds:
    """The bounds of a graph, some of whose tensors are to be stored in other types."""
    whole = exponents = 0.0
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if not array.size:
            continue
        code = encoded.get(tensor.name)
        stored = np.dtype(code.values) if code is not None else array.dtype
        is_weight = tensor.data_type in (TensorProto.FLOAT, TensorProto.INT8) and array.ndim > 1
        values = array[array != 0] if is_weight else array.reshape(-1)
        positions = array.size * _entropy(values.size / array.size)
        bits = 8 * stored.itemsize
        whole += (positions + values.size * bits) / 8
        coded = _SIGN_AND_MANTISSA_BITS + exponent_entropy(values) if stored == np.float32 else bits
        exponents += (positions + values.size * coded) / 8
    return EntropyBounds(whole, exponents)


def _entropy(density: float) -> float:
    """H(d) = -d log2(d) - (1 - d) log2(1 - d), in bits."""
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p > 0)
