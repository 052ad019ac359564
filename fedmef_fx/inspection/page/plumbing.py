"""Nodes that only carry something from one operation to another: sizes, elements of tuples, slices, expanded views.

Which operators these are stands in their rows. What Python's operators compute from sizes alone is a size as well.
"""

import functools
import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedmef_fx.graph.operators import rows
from fedmef_fx.graph.operators.operator import Plumbing
from fedmef_fx.records.graphs import NodeRecord

__all__ = ["facts_in", "is_part"]


def facts_in(nodes: Iterable[NodeRecord]) -> set[str]:
    """Names of the nodes whose values say something about tensors and are none.

    Args:
        nodes: Of one graph, in order of execution.
    """
    facts: set[str] = set()
    for node in nodes:
        if node.tensors or not node.op.startswith("call"):
            continue
        from_facts = bool(node.inputs) and facts.issuperset(node.inputs)
        if _plumbing(node) == "fact" or (from_facts and hasattr(operator, node.target)):
            facts.add(node.name)
    return facts


def is_part(node: NodeRecord) -> bool:
    """Whether a node's value is, for whoever reads the graph, the tensor that it was taken from."""
    return _plumbing(node) == "part"


def _plumbing(node: NodeRecord) -> Plumbing:
    if node.op not in ("call_function", "call_method"):
        return ""
    kind = _by_name().get(node.target, "")
    attribute = node.arguments.rpartition(", ")[2].strip("'")
    is_attribute = kind == "fact" and node.target == getattr.__name__
    return "part" if is_attribute and (node.tensors or _is_tensor(attribute)) else kind


@functools.cache
def _is_tensor(attribute: str) -> bool:
    return isinstance(getattr(torch.empty(1, 1), attribute, None), Tensor)


@functools.cache
def _by_name() -> Mapping[str, Plumbing]:
    """What rows say, by the names that nodes show."""
    names: dict[str, Plumbing] = {}
    for row in rows():
        functions = (getattr(function, "__name__", "") for function in row.functions)
        if row.plumbing:
            names |= dict.fromkeys((row.name, *functions, *row.methods), row.plumbing)
    return names
