"""Strip what inference does not need from an ONNX model: exporter metadata, stack traces with local paths, shapes.

Names of nodes and tensors stay: profilers and quantization tools refer to them.
"""

import re
from typing import Any, Final

import onnx

from fedmef_fx.export.sizes import Sizes

__all__ = ["strip"]

_WORD: Final = re.compile(r"\b[A-Za-z_]\w*\b")


def strip(model: onnx.ModelProto, sizes: Sizes | None = None) -> None:
    """Strip a model in place, and name the sizes that vary.

    Args:
        model: The model.
        sizes: Sizes by input and dimension; any other that varies is the batch.
    """
    _clear(model)
    for function in model.functions:
        _clear(function)
        _strip_nodes(function.node)
    _strip_graph(model.graph)
    # What is left needs no newer format than its operators; a runtime refuses a newer one than it knows.
    model.ir_version = onnx.helper.find_min_ir_version_for(list(model.opset_import))
    _name_sizes(model.graph, sizes or {})


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


def _name_sizes(graph: onnx.GraphProto, sizes: Sizes) -> None:
    """The exporter calls sizes `s31` or the like; results may have products of them."""
    names: dict[str, str] = {}
    for value in graph.input:
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            size = sizes.get(value.name, {}).get(index)
            for word in _WORD.findall(dim.dim_param):  # one: 32*s31
                names.setdefault(word, "batch" if size is None else size.name)
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if not dim.dim_param:
                continue  # setting it would erase the number
            dim.dim_param = _WORD.sub(lambda word: names.get(word[0], word[0]), dim.dim_param)
