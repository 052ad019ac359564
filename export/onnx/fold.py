"""Run the decoders of a file once, and put what they make in their place.

1. Decoders are the nodes that depend on constants alone and are of the kinds that decoders are made of. What they make
   for the other nodes becomes an initializer, under the name of the parameter where it is one.
2. Before anything runs, the sizes of all tensors in between are inferred and held against what the manifest promises.
"""

import math
from typing import Final

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.manifest import Manifest
from fedmef_fx.export.onnx.sessions import open_session

__all__ = ["folded", "put_in_place"]

_DECODERS: Final = frozenset(
    {
        *("Add", "Cast", "Concat", "ConstantOfShape", "CumSum", "Equal", "Gather", "Less", "Mul", "Reshape"),
        *("ScatterElements", "Slice", "Sub"),
        *("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr"),  # of files of earlier versions
    }
)
_MOST_TEMPORARIES: Final = 40  # times the bytes of a decoded tensor that its decoder may make on the way


def folded(proto: ModelProto, manifest: Manifest) -> dict[str, TensorProto]:
    """What decoders make for the nodes that run: initializers by name of the value.

    Raises:
        ExportError: Decoders that are not what the manifest says, or would take too much memory.
    """
    graph = proto.graph
    constant = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    decoders: list[NodeProto] = []
    wanted = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type in _DECODERS and not node.domain and all(name in constant for name in node.input if name):
            decoders.append(node)
            constant.update(node.output)
        else:
            wanted.update(node.input)
    outputs = [name for node in decoders for name in node.output if name in wanted]
    missing = [row.name for row in manifest.tensors if row.value not in outputs]
    if missing:
        raise ExportError(f"its manifest says that {missing[0]!r:.100} is decoded, but no decoder makes it")
    if not outputs:
        return {}
    model = _model_of(proto, decoders, outputs)
    _check_sizes(model, manifest)
    session = open_session(model.SerializeToString())
    try:
        arrays = session.runtime.run(outputs, {})
    except Exception as error:  # onnxruntime's errors have no other common base
        raise ExportError(f"its decoders cannot be run: {error!s:.200}; the file is damaged or hostile") from error
    constants = {name: numpy_helper.from_array(array, name) for name, array in zip(outputs, arrays, strict=True)}
    for row in manifest.tensors:
        shape = tuple(constants[row.value].dims)
        if shape != row.shape:
            raise ExportError(f"{row.name!r:.100} decodes to the shape {shape}; its manifest says {row.shape}")
    return constants


def _model_of(proto: ModelProto, nodes: list[NodeProto], outputs: list[str]) -> ModelProto:
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "decoders",
        inputs=[],
        outputs=[onnx.ValueInfoProto(name=name) for name in outputs],
        initializer=[tensor for tensor in proto.graph.initializer if tensor.name in read],
    )
    return helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)


def _check_sizes(model: ModelProto, manifest: Manifest) -> None:
    """Refuse decoders that would make more than the tensors of the manifest and the bytes of the file account for."""
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    allowed = _MOST_TEMPORARIES * (stored + 4 * sum(row.numel for row in manifest.tensors))
    try:
        inferred = shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    except Exception as error:  # its errors have no other common base
        raise ExportError(f"the shapes of its decoders cannot be inferred: {error!s:.200}") from error
    shapes = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    total = 0
    for node in model.graph.node:
        for name in node.output:
            known = name in shapes and shapes[name].HasField("shape")
            dims = (
                [dim.dim_value if dim.HasField("dim_value") else -1 for dim in shapes[name].shape.dim] if known else []
            )
            if not known or any(size < 0 for size in dims):
                raise ExportError(f"the size of {name!r:.100}, which a decoder makes, is not fixed")
            total += 4 * math.prod(dims)
    if total > allowed:
        raise ExportError(f"its decoders would make {total:,} bytes; expected at most {allowed:,} for what they decode")


def put_in_place(proto: ModelProto, constants: dict[str, TensorProto], names: dict[str, str]) -> None:
    """Make decoded tensors initializers, and leave out what nothing reads any more."""
    graph = proto.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    renamed = {value: name for value, name in names.items() if name not in taken}
    kept: list[NodeProto] = []
    read = {value.name for value in graph.output}
    for node in reversed(graph.node):
        if any(name in read and name not in constants for name in node.output):
            kept.append(node)
            read.update(node.input)
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    for name, tensor in constants.items():
        tensor.name = renamed.get(name, name)
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:]
    graph.node.extend(reversed(kept))
    del graph.initializer[:]
    graph.initializer.extend([*initializers, *constants.values()])
