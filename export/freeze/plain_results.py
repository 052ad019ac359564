"""Objects that a model returns, put together by calls of their own classes: named tuples, dataclasses, dictionaries.

Rules
1. `Rebuild` of a named tuple -> `kind(*parts)`; of a dataclass -> `kind(**parts)`; of a dictionary with an order of its
   own -> `kind([(key, part), ...])`. What is nested in them likewise, tuples and lists as such.
2. Others keep their `Rebuild`, which the caller refuses: an object whose attributes were set has no call that makes it.
"""

from typing import Any

from torch import fx

from fedmef_fx.capture.rebuild import Constant, Hole, Made, Rebuild

__all__ = ["restore_plain_results"]


def restore_plain_results(graph: fx.Graph) -> None:
    """Apply the rules of this module to a graph, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, Rebuild) and _is_plain(node.target.skeleton):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_emitted(graph, node.target.skeleton, node.args))
            graph.erase_node(node)


def _is_plain(skeleton: Any) -> bool:
    if not isinstance(skeleton, Made):
        return not isinstance(skeleton, Constant)
    return skeleton.way != "state" and all(_is_plain(part) for _, part in skeleton.parts)


def _emitted(graph: fx.Graph, skeleton: Any, tensors: tuple[Any, ...]) -> Any:
    if isinstance(skeleton, Hole):
        return tensors[skeleton.index]
    if not isinstance(skeleton, Made):
        return skeleton
    parts = {name: _emitted(graph, part, tensors) for name, part in skeleton.parts}
    if skeleton.kind in (tuple, list):
        return skeleton.kind(parts.values())
    if skeleton.way == "call":
        return graph.call_function(skeleton.kind, tuple(parts.values()))
    if skeleton.way == "fields":
        return graph.call_function(skeleton.kind, (), parts)
    if skeleton.way == "items":
        return graph.call_function(skeleton.kind, (list(parts.items()),))
    return graph.call_function(skeleton.kind, (list(parts.values()),))
