"""What autograd keeps of a graph's tensors between forward and backward, node by node.

A tensor costs its bytes as long as one node keeps it, so pruning one layer's copy of it pays only if nothing else
keeps it dense. Unknown operations are taken to keep everything: too cautious costs memory, never correctness.
"""

import operator
from collections.abc import Collection
from typing import Final, NamedTuple

from torch import fx

from fedmef_fx.graph.gradients import differentiable
from fedmef_fx.graph.nodes import is_inplace, operator_at, without_views
from fedmef_fx.graph.operators import Operator
from fedmef_fx.graph.program import Region

__all__ = ["Kept", "kept_by", "kept_tensors"]


class Kept(NamedTuple):
    """Which tensors of a node autograd keeps."""

    inputs: bool
    output: bool


_KEPT: Final = {
    "nothing": Kept(inputs=False, output=False),
    "inputs": Kept(inputs=True, output=False),
    "output": Kept(inputs=False, output=True),
    "both": Kept(inputs=True, output=True),
}


def kept_by(region: Region, node: fx.Node) -> Kept:
    """What autograd keeps of a node's tensors, as PyTorch implements its operation."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return _KEPT["nothing"]
    row = operator_at(region, node)
    if row is None:
        return _KEPT["both"]
    if _is_scaling(row, node):
        return _KEPT["nothing"]
    # What it writes in place of its input is its result.
    keeps_input_too = is_inplace(region, node) and row.keeps == "inputs"
    return _KEPT["both" if keeps_input_too else row.keeps]


def _is_scaling(row: Operator, node: fx.Node) -> bool:
    """Whether a node is a product or quotient of a tensor and a number, which is linear in the tensor."""
    if row.kind not in ("mul", "div") or len(node.args) != 2 or len(node.all_input_nodes) != 1:
        return False
    return isinstance(node.args[0], fx.Node) or row.kind == "mul"


def _inputs_kept(row: Operator | None, node: fx.Node, carriers: Collection[fx.Node]) -> list[fx.Node]:
    """The inputs that a node keeps, if it keeps them: a product needs an operand for the other one's gradient only."""
    operands = node.all_input_nodes
    if row is None or row.in_8_bits != "product" or len(operands) != 2:
        return operands
    first, second = operands
    return [x for x, other in ((first, second), (second, first)) if other in carriers]


def _written_by(region: Region, node: fx.Node) -> fx.Node | None:
    """The node in whose storage a node writes, None for a node that writes into nothing."""
    if not node.args or not (is_inplace(region, node) or node.target is operator.setitem):
        return None
    root = without_views(region, node.args[0])
    return root if isinstance(root, fx.Node) else None


def kept_tensors(region: Region, graph: fx.Graph, *, rewritten: set[fx.Node]) -> dict[fx.Node, str]:
    """The tensors of a graph that stay dense between forward and backward, whatever is done to some nodes.

    Args:
        region: The region of the graph.
        graph: The graph.
        rewritten: Nodes that will keep none of their activations dense.

    Returns:
        The node in whose storage each such tensor lies, with who keeps it.
    """
    kept: dict[fx.Node, str] = {}
    is_whole = not region.path  # what goes in and out of an inner region mostly belongs to other regions
    results: list[fx.Node] = []
    carriers = differentiable(region, graph)

    def keep(tensor: object, reason: str) -> None:
        root = without_views(region, tensor)
        if isinstance(root, fx.Node):
            kept.setdefault(root, reason)

    for node in graph.nodes:
        if node.op == "placeholder" and is_whole:
            keep(node, "an input of the model, which its caller holds")
        elif node.op == "get_attr":
            keep(node, "a tensor of the model")
        elif node.op == "output":
            for tensor in node.all_input_nodes if is_whole else ():
                keep(tensor, "returned by the model")
        elif node.op != "placeholder" and node not in rewritten:
            keeps = kept_by(region, node)
            for tensor in _inputs_kept(operator_at(region, node), node, carriers) if keeps.inputs else ():
                keep(tensor, f"{node.name} keeps its input")
            if keeps.output:
                results.append(node)
    for node in graph.nodes:
        written = _written_by(region, node)
        if written is not None and len(written.users) > 1:
            keep(written, f"{node.name} writes into it between its readers")
    # Last, since a reader that keeps a result is the better reason: a ReLU that is free to may forget its own.
    for node in results:
        keep(node, f"{node.name} keeps its result")
    return kept
