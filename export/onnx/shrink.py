"""Shrink what stands around the weights of a graph, without changing a bit of what it computes.

Rules
1. Zero points of weights and biases are all 0: they become `ConstantOfShape`, one per size and type.
2. The scale of a bias is the scale of its layer's input times the scales of its weight: it becomes their `Mul`, where
   that gives the same bits.
3. Small initializers of equal type, shape and content become one.

A runtime folds the new nodes when it loads the file, like those that decode weights.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fedmef_fx.export.onnx.names import graphs_of, names_of

__all__ = ["share_equal", "shrink_quantizers"]

_SHARED_BYTES: Final = 4096
_NODE_BYTES: Final = 48  # of a node that replaces an initializer


def shrink_quantizers(proto: ModelProto) -> None:
    """Apply rules 1 and 2, in place."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    new: dict[str, NodeProto] = {}
    added: list[TensorProto] = []
    zeros: dict[tuple[tuple[int, ...], int], str] = {}
    taken = names_of(proto)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3 and node.input[0] in arrays:
            _share_zero_point(node, arrays, zeros, new, added, taken)
    for node in proto.graph.node:
        scales = _bias_scale(node, makers, arrays)
        if scales is not None:
            bias, factors = scales
            name = _free(f"{bias}_product", taken)
            new[name] = helper.make_node("Mul", factors, [name])
            makers[node.input[2]].input[1] = name
    _put_first(proto, list(new.values()), added)


def _share_zero_point(
    node: NodeProto,
    arrays: dict[str, NDArray[Any]],
    zeros: dict[tuple[tuple[int, ...], int], str],
    new: dict[str, NodeProto],
    added: list[TensorProto],
    taken: set[str],
) -> None:
    zero = arrays.get(node.input[2])
    if zero is None or zero.nbytes < _NODE_BYTES or zero.any():
        return
    key = (zero.shape, helper.np_dtype_to_tensor_dtype(zero.dtype))
    if key not in zeros:
        zeros[key], sizes = _free("zeros", taken), _free("sizes", taken)
        added.append(numpy_helper.from_array(np.array(zero.shape, np.int64), sizes))
        value = numpy_helper.from_array(np.zeros(1, zero.dtype))
        new[zeros[key]] = helper.make_node("ConstantOfShape", [sizes], [zeros[key]], value=value)
    node.input[2] = zeros[key]


def _bias_scale(
    layer: NodeProto, makers: dict[str, NodeProto], arrays: dict[str, NDArray[Any]]
) -> tuple[str, tuple[str, str]] | None:
    """Name of the scale of a layer's bias, and of the two scales whose product it is."""
    if len(layer.input) < 3:
        return None
    sources = [makers.get(name) for name in layer.input[:3]]
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
        return None
    x, weight, bias = (source.input[1] for source in sources if source is not None)
    if not {x, weight, bias} <= arrays.keys() or arrays[bias].nbytes < _NODE_BYTES or arrays[x].size != 1:
        return None
    product = np.multiply(arrays[x], arrays[weight], dtype=np.float32)
    if product.shape != arrays[bias].shape or product.tobytes() != arrays[bias].tobytes():
        return None
    return bias, (x, weight)


def share_equal(proto: ModelProto) -> None:
    """Apply rule 3, in place, and leave out initializers that nothing reads."""
    graph = proto.graph
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    replaced: dict[str, str] = {}
    outputs = {value.name for value in graph.output}
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes > _SHARED_BYTES or tensor.name in outputs or tensor.name in inputs:
            continue
        key = (tensor.data_type, tuple(tensor.dims), array.tobytes())
        replaced[tensor.name] = kept.setdefault(key, tensor.name)
    for inner in graphs_of(graph):
        own = set() if inner is graph else {value.name for value in (*inner.input, *inner.initializer)}
        for node in inner.node:
            node.input[:] = [name if name in own else replaced.get(name, name) for name in node.input]
    reads = {name for inner in graphs_of(graph) for node in inner.node for name in node.input}
    reads |= {value.name for inner in graphs_of(graph) for value in inner.output}
    needed = [tensor for tensor in graph.initializer if tensor.name in reads]
    graph.ClearField("initializer")
    graph.initializer.extend(needed)


def _put_first(proto: ModelProto, nodes: list[NodeProto], added: list[TensorProto]) -> None:
    rest = list(proto.graph.node)
    proto.graph.ClearField("node")
    proto.graph.node.extend([*nodes, *rest])
    proto.graph.initializer.extend(added)


def _free(name: str, taken: set[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        unique, number = f"{name}_{number}", number + 1
    taken.add(unique)
    return unique
