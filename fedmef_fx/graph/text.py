"""Graphs as text: one line a node, the same in every process.

%conv1_weight = get_attr[conv1.weight]  # f32[8,1,3,3] density=0.20 [functionalize-weights <- conv1]
%conv2d = call_function[conv2d](%x, %masked_weight, None, stride=(1, 1))  # f32[2,8,6,6] saved=288 B dense @conv1
return %conv2d

A comment has the shape and dtype of the value, the density of a masked weight, what the node keeps for backward, the
pass that made it with what it was made from, and, after @, the module it belongs to where the target does not say so.
"""

from collections.abc import Iterable

from fedmef_fx.graph.recording import visible
from fedmef_fx.records.graphs import GraphRecord, NodeRecord, SavedRecord

__all__ = ["graph_text", "node_text"]


def graph_text(graphs: Iterable[GraphRecord]) -> str:
    """Several graphs as text.

    Args:
        graphs: Their records.

    Returns:
        The lines of each graph; above them its region and mode, except for the only graph of a whole model.
    """
    return "\n\n".join(_one_graph(graph) for graph in graphs)


def _one_graph(graph: GraphRecord) -> str:
    heading = [f"# {visible(graph.label)}"] if graph.label else []
    return "\n".join([*heading, *map(node_text, graph.nodes)])


def node_text(node: NodeRecord) -> str:
    """The line of one node."""
    call = _call(node)
    facts = _facts(node)
    return f"{call}  # {facts}" if facts else call


def _call(node: NodeRecord) -> str:
    if node.op == "output":
        return f"return {node.arguments}"
    call = f"%{node.name} = {node.op}[{visible(node.target)}]"
    return call if node.op in ("placeholder", "get_attr") and not node.arguments else f"{call}({node.arguments})"


def _facts(node: NodeRecord) -> str:
    shown = [str(tensor) for tensor in node.tensors] if node.op != "output" else []
    facts = [shown[0] if len(shown) == 1 else f"({', '.join(shown)})"] if shown else []
    if node.density is not None:
        facts.append(f"density={node.density:.2f}")
    if node.saved:
        facts.append(f"saved={visible(' + '.join(map(str, _merged(node.saved))))}")
    if node.made_by is not None:
        facts.append(f"[{node.made_by} <- {visible(node.origin or '')}]")
    if node.module and node.op in ("call_function", "call_method"):
        facts.append(f"@{visible(node.module)}")
    return " ".join(facts)


def _merged(saved: tuple[SavedRecord, ...]) -> list[SavedRecord]:
    """One record per codec and place where it counts."""
    total: dict[tuple[str, str], int] = {}
    for record in saved:
        key = (record.counted_at, record.codec)
        total[key] = total.get(key, 0) + record.nbytes
    return [SavedRecord(codec, nbytes, counted_at) for (counted_at, codec), nbytes in sorted(total.items())]
