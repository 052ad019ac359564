"""Graphs in Graphviz's DOT language.

Node identifiers are numbers and names stand only inside quoted, escaped strings, so no name can end a string early or
start HTML-like markup.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from fedmef_fx.display.printable import shortened, visible
from fedmef_fx.inspection.pass_colours import tint_of
from fedmef_fx.records.graphs import GraphRecord, NodeRecord

__all__ = ["to_dot"]

_LONGEST: Final = 80


def to_dot(graphs: Iterable[GraphRecord]) -> str:
    """All graphs of a model as one DOT document.

    Args:
        graphs: Their records.

    Returns:
        DOT text, one cluster per graph; nodes that a pass made are filled with its colour.
    """
    lines = [
        "digraph model {",
        '  node [shape=box, style="rounded,filled", fillcolor="#ffffff", fontname="sans-serif"];',
    ]
    for number, graph in enumerate(graphs):
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(graph.label or 'model')};"]
        lines += [f"    {line}" for line in _statements(graph, f"g{number}n")]
        lines.append("  }")
    return "\n".join([*lines, "}"])


def _statements(graph: GraphRecord, prefix: str) -> Iterator[str]:
    identifiers = {node.name: f"{prefix}{index}" for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        fill = f", fillcolor={_quoted(tint_of(node.made_by))}, tooltip={_quoted(node.made_by)}" if node.made_by else ""
        yield f"{identifiers[node.name]} [label={_label(node)}{fill}];"
        yield from (f"{identifiers[source]} -> {identifiers[node.name]};" for source in node.inputs)


def _label(node: NodeRecord) -> str:
    facts = [str(tensor) for tensor in node.tensors] if node.op != "output" else []
    if node.density is not None:
        facts.append(f"density {node.density:.2f}")
    if node.saved_bytes:
        facts.append(f"saves {node.saved_bytes} B")
    kind = node.op if node.op == "output" else f"{node.op} {shortened(node.target, longest=_LONGEST)}"
    return _quoted(*(line for line in (shortened(node.name, longest=_LONGEST), kind, ", ".join(facts)) if line))


def _quoted(*lines: str) -> str:
    """Lines as one DOT string; DOT reads a backslash as the start of an escape of its own."""
    escaped = (visible(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
