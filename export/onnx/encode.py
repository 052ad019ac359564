"""Encode: choose for each weight of an ONNX graph how it is stored, and put its decoder in its place.

Rules
1. Encoded are float32 initializers of the main graph, and int8 ones of a quantized graph, where the file gets smaller.
2. Lossless storage keeps every bit. Lossy storage rounds float32 weights of two dimensions or more; biases and other
   vectors stay exact, and so do small weights: first layers and depthwise kernels. These are percents of the bytes, and
   what all later layers amplify: on MobileNetV2 rounding them makes up 6/7 of the error.
3. A tensor that several nodes read is stored and decoded once.
4. Exponents of float32 values are coded in as many active weights as are 4 % of all weights, in the largest tensors
   first. Decoding them takes some 50 bytes of memory per active weight, which onnxruntime keeps until it has folded
   everything: with all of them, ResNet50 at density 0.1 takes 1.8 times the memory of the dense file, in place of 1.6.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper

from fedmef_fx.export.onnx.codecs.tensor import EncodedTensor, decode_tensor, encode_tensor
from fedmef_fx.export.onnx.codecs.values import ValueCode
from fedmef_fx.export.onnx.decode_graph import DecodeGraph
from fedmef_fx.export.onnx.names import names_of

__all__ = ["Encoding", "StoredWeights", "apply_encoding", "encode", "round_weights", "zero_is_positive"]

StoredWeights = Literal["dense", "packed", "packed-int16", "packed-fp16"]
_VALUES: Final[dict[StoredWeights, ValueCode]] = {
    "packed": "float32",
    "packed-int16": "int16",
    "packed-fp16": "float16",
}
# A weight is small with fewer elements than the first, or than the second and a share of all weights.
_LEAST_LOSSY_NUMEL: Final = 256
_LARGEST_SMALL_NUMEL: Final = 8192
_SMALL_SHARE: Final = 1 / 400
_LARGEST_FLOAT16: Final = float(np.finfo(np.float16).max)
_SPLIT_SHARE: Final = 0.04
_NEGATIVE_ZERO: Final = np.uint32(0x80000000)  # bits of a float32
_SMALLEST_BYTES: Final = 512  # less cannot pay for a decoder


@dataclasses.dataclass(frozen=True, slots=True)
class Encoding:
    """How the weights of a graph are to be stored.

    Attributes:
        tensors: By name of the initializer; the others stay as they are.
        notices: What was stored otherwise than asked for, and why.
    """

    tensors: dict[str, EncodedTensor]
    notices: tuple[str, ...] = ()


def zero_is_positive(proto: ModelProto) -> None:
    """Make the zeros of float32 weights +0, in place.

    Folding a BatchNorm with a negative scale leaves -0 where a weight is masked. They multiply alike, and only +0 is a
    bit pattern that need not be stored.
    """
    for tensor in _candidates(proto):
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if (array.view(np.uint32) == _NEGATIVE_ZERO).any():
                tensor.CopyFrom(numpy_helper.from_array(array + np.float32(0.0), tensor.name))


def encode(proto: ModelProto, weights: StoredWeights) -> Encoding:
    """Choose how each weight is stored; the graph stays as it is."""
    tensors: dict[str, EncodedTensor] = {}
    notices = []
    candidates = _candidates(proto) if weights != "dense" else []
    share = int(_SMALL_SHARE * sum(math.prod(tensor.dims) for tensor in candidates))
    split = _split(candidates)
    lossy_numel = max(_LEAST_LOSSY_NUMEL, min(_LARGEST_SMALL_NUMEL, share))
    for tensor in candidates:
        array = numpy_helper.to_array(tensor)
        values: ValueCode = "int8" if array.dtype == np.int8 else _VALUES[weights]
        if array.ndim < 2 or array.size < lossy_numel:
            values = "int8" if array.dtype == np.int8 else "float32"
        if values == "float16" and (largest := float(np.abs(array).max())) > _LARGEST_FLOAT16:
            notices.append(f"{tensor.name} stays float32: it reaches {largest:.3g}, more than float16 holds")
            values = "float32"
        encoded = encode_tensor(array, values, splits=tensor.name in split)
        if encoded is not None:
            tensors[tensor.name] = encoded
    return Encoding(tensors, tuple(notices))


def round_weights(proto: ModelProto, encoded: Mapping[str, EncodedTensor]) -> None:
    """Give the weights the values that their decoders will give them, in place: the reference for an encoded graph."""
    for tensor in proto.graph.initializer:
        if tensor.name in encoded:
            tensor.CopyFrom(numpy_helper.from_array(decode_tensor(encoded[tensor.name]), tensor.name))


def apply_encoding(proto: ModelProto, encoded: Mapping[str, EncodedTensor]) -> None:
    """Put decoders in the place of weights, in place; the decoded tensors keep the names."""
    graph = proto.graph
    decoders = DecodeGraph(names_of(proto))
    for name, tensor in encoded.items():
        decoders.add(tensor, name)
    nodes = list(graph.node)
    kept = [tensor for tensor in graph.initializer if tensor.name not in encoded]
    graph.ClearField("node")
    graph.node.extend([*decoders.nodes, *nodes])
    graph.ClearField("initializer")
    graph.initializer.extend([*kept, *decoders.initializers])


def _split(tensors: list[TensorProto]) -> set[str]:
    """Those whose exponents may be coded."""
    active = {tensor.name: int(np.count_nonzero(numpy_helper.to_array(tensor))) for tensor in tensors}
    left = int(_SPLIT_SHARE * sum(math.prod(tensor.dims) for tensor in tensors))
    chosen = set()
    for name in sorted(active, key=lambda name: -active[name]):
        if active[name] <= left:
            chosen.add(name)
            left -= active[name]
    return chosen


def _candidates(proto: ModelProto) -> list[TensorProto]:
    """Initializers that may be encoded: large enough, of a type that has a code, and no input that a caller may set."""
    inputs = {value.name for value in proto.graph.input}
    return [
        tensor
        for tensor in proto.graph.initializer
        if tensor.name not in inputs
        and tensor.data_type in (TensorProto.FLOAT, TensorProto.INT8)
        and len(tensor.dims) > 0
        and math.prod(tensor.dims) * (4 if tensor.data_type == TensorProto.FLOAT else 1) >= _SMALLEST_BYTES
    ]
