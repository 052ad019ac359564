"""Where the nodes of an ONNX graph come from, as torch's exporter notes it in their metadata."""

import re
from typing import Final

from onnx import ModelProto, NodeProto

__all__ = ["origin_of", "readers_of"]

_FX_NODE: Final = "pkg.torch.onnx.fx_node"


def origin_of(node: NodeProto) -> str:
    """Name of the node of the traced program that a node was translated from; empty where it is not known."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _FX_NODE), "")
    match = re.match(r"%(\w+)", text)
    return match[1] if match else ""


def readers_of(proto: ModelProto) -> dict[str, str]:
    """For each value, the traced node whose translation reads it first."""
    readers: dict[str, str] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, origin_of(node))
    return readers
