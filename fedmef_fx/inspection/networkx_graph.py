"""Graphs for networkx: one node per graph node, one edge per tensor that flows."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedmef_fx.graph.text import node_text
from fedmef_fx.records.graphs import GraphRecord, NodeRecord

if TYPE_CHECKING:
    import networkx

__all__ = ["to_networkx"]


def to_networkx(graphs: Iterable[GraphRecord]) -> "networkx.DiGraph[str]":
    """All graphs of a model as one directed graph, without edges between them; see `Inspection.to_networkx`."""
    import networkx  # noqa: PLC0415 -- takes 0.2 s to import, which only its users should wait for

    result: networkx.DiGraph[str] = networkx.DiGraph()
    for graph in graphs:
        prefix = f"{graph.label}/" if graph.label else ""
        for order, node in enumerate(graph.nodes):
            result.add_node(prefix + node.name, order=order, region=graph.region, mode=graph.mode, **_attributes(node))
            for position, source in enumerate(node.inputs):
                result.add_edge(prefix + source, prefix + node.name, position=position)
    return result


def _attributes(node: NodeRecord) -> dict[str, Any]:
    """The attributes of a node; what is not known or does not apply is left out."""
    tensor = node.tensors[0] if len(node.tensors) == 1 else None
    attributes = {
        "op": node.op,
        "target": node.target,
        "module": node.module,
        "text": node_text(node),
        "shape": tensor and tensor.shape,
        "dtype": tensor and tensor.dtype,
        "density": node.density,
        "saved": tuple((s.codec, s.nbytes) for s in node.saved if not s.counted_at) if node.saved is not None else None,
        "saved_bytes": node.saved_bytes,
        "made_by": node.made_by,
        "origin": node.origin,
    }
    return {key: value for key, value in attributes.items() if value is not None}
