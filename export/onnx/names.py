"""Names in an ONNX graph: which there are, and shorter ones for those that no caller sees.

A name stands in a file once where it is made and once for each reader; in a small file they add up to percents.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, defs

from fedmef_fx.export.onnx.decode_graph import short_names

__all__ = ["drop_defaults", "graphs_of", "names_of", "shorten_names"]

_DEFAULT_ONE: Final = ("strides", "dilations")
_PARTS: Final = ("Gather", "Slice")
_WINDOWS: Final = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and the graphs in the attributes of its nodes, at every depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs_of(inner)


def names_of(proto: ModelProto) -> set[str]:
    """All names of values in a model."""
    names: set[str] = set()
    for graph in graphs_of(proto.graph):
        names.update(value.name for value in (*graph.input, *graph.output, *graph.initializer))
        for node in graph.node:
            names.update((*node.input, *node.output))
    return names


def shorten_names(proto: ModelProto) -> Mapping[str, str]:
    """Give values short names and nodes none, in place; inputs and outputs of the model keep theirs.

    Nodes that take parts of one tensor are named after their results: onnxruntime up to 1.20 makes one node of each two
    of them and names it after the first, and refuses the model when two of these come out with one name.

    Returns:
        The new name of each value that has one.
    """
    kept = {value.name for value in (*proto.graph.input, *proto.graph.output)} | {""}
    names = short_names(kept)
    renamed: dict[str, str] = {}

    def new(name: str) -> str:
        if name in kept:
            return name
        if name not in renamed:
            renamed[name] = next(names)
        return renamed[name]

    for graph in graphs_of(proto.graph):
        if graph is not proto.graph:
            graph.name = "g"
        parts = collections.Counter(node.input[0] for node in graph.node if node.op_type in _PARTS)
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = new(value.name)
        for node in graph.node:
            takes_part = node.op_type in _PARTS and parts[node.input[0]] > 1
            node.input[:] = [new(name) for name in node.input]
            node.output[:] = [new(name) for name in node.output]
            node.name = node.output[0] if takes_part else ""
    return renamed


def drop_defaults(proto: ModelProto) -> None:
    """Leave out attributes that say what holds without them, in place."""
    versions = {entry.domain or "": entry.version for entry in proto.opset_import}
    for graph in graphs_of(proto.graph):
        for node in graph.node:
            kept = [a for a in node.attribute if not _is_default(node, a, versions.get(node.domain))]
            node.ClearField("attribute")
            node.attribute.extend(kept)


def _is_default(node: NodeProto, attribute: object, version: int | None) -> bool:
    name, ints = attribute.name, list(attribute.ints)  # type: ignore[attr-defined]  # an AttributeProto
    if node.op_type in _WINDOWS and name in _DEFAULT_ONE:
        return all(size == 1 for size in ints)
    if node.op_type in _WINDOWS and name in ("pads", "output_padding"):
        return not any(ints)
    if version is None or not defs.has(node.op_type, node.domain):
        return False
    declared = defs.get_schema(node.op_type, version, node.domain).attributes.get(name)
    return declared is not None and declared.default_value == attribute
