"""Strip what inference does not need from an ONNX model: exporter metadata, stack traces with local paths, shapes.

Names of nodes and tensors stay: profilers and quantization tools refer to them.
"""

import re
from typing import Any

import onnx

__all__ = ["strip"]


def strip(model: onnx.ModelProto) -> None:
    """Strip a model in place, and name its varying batch size `batch`."""
    _clear(model)
    for function in model.functions:
        _clear(function)
        _strip_nodes(function.node)
    _strip_graph(model.graph)
    _name_batch(model.graph)


def _clear(message: Any) -> None:
    """Empty the two fields for free text that most messages of ONNX have."""
    for field in ("metadata_props", "doc_string"):
        if field in message.DESCRIPTOR.fields_by_name:
            message.ClearField(field)


def _strip_graph(graph: onnx.GraphProto) -> None:
    _clear(graph)
    graph.ClearField("value_info")  # runtimes infer the shapes in between
    for message in (*graph.initializer, *graph.input, *graph.output):
        _clear(message)
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Any) -> None:
    for node in nodes:
        _clear(node)
        for attribute in node.attribute:
            _clear(attribute)
            for graph in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                _strip_graph(graph)


def _name_batch(graph: onnx.GraphProto) -> None:
    """The exporter calls the batch size `s31` or the like; it is the only size that varies."""
    dims = [d for value in (*graph.input, *graph.output) for d in value.type.tensor_type.shape.dim if d.dim_param]
    symbols = [value.type.tensor_type.shape.dim[:1] for value in graph.input]
    symbol = next((first[0].dim_param for first in symbols if first and first[0].dim_param), None)
    for dim in dims if symbol else ():
        dim.dim_param = re.sub(rf"\b{re.escape(str(symbol))}\b", "batch", dim.dim_param)
