"""Objects that a model returns, put together by calls that every Python has: named tuples, dataclasses, caches.

Rules
1. `Rebuild` of a named tuple -> `kind(*parts)`; of a dataclass -> `kind(**parts)`; of a dictionary with an order of its
   own -> `kind([(key, part), ...])`. What is nested in them likewise, tuples and lists as such.
2. `Rebuild` of any other object -> a new one with the same attributes. It is one call, `copy._reconstruct`, and not a
   `setattr` per attribute, because a graph may lose nodes that nothing reads.
3. Classes, and objects that no call changes, cannot stand in a graph: they become attributes of the module.
"""

import copy
from typing import Any

from torch import fx

from fedmef_fx.capture.rebuild import Constant, Hole, Made, Rebuild
from fedmef_fx.graph.program import Region

__all__ = ["restore_plain_results"]

_reconstruct: Any = copy._reconstruct  # type: ignore[attr-defined]  # what `copy.copy` calls; typeshed leaves it out


def restore_plain_results(region: Region, graph: fx.Graph) -> None:
    """Apply the rules of this module to a graph, in place."""
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, Rebuild):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_emitted(region, graph, node.target.skeleton, node.args))
            graph.erase_node(node)


def _emitted(region: Region, graph: fx.Graph, skeleton: Any, tensors: tuple[Any, ...]) -> Any:
    if isinstance(skeleton, Hole):
        return tensors[skeleton.index]
    if isinstance(skeleton, Constant | type):
        return _held(region, graph, skeleton.value if isinstance(skeleton, Constant) else skeleton)
    if not isinstance(skeleton, Made):
        return skeleton
    parts = {name: _emitted(region, graph, part, tensors) for name, part in skeleton.parts}
    if skeleton.kind in (tuple, list):
        return skeleton.kind(parts.values())
    if skeleton.way == "call":
        return graph.call_function(skeleton.kind, tuple(parts.values()))
    if skeleton.way == "fields":
        return graph.call_function(skeleton.kind, (), parts)
    if skeleton.way == "items":
        return graph.call_function(skeleton.kind, (list(parts.items()),))
    if skeleton.way == "state":
        kind = _held(region, graph, skeleton.kind)
        make = graph.call_function(getattr, (kind, "__new__"))
        return graph.call_function(_reconstruct, (None, None, make, (kind,), parts))
    return graph.call_function(skeleton.kind, (list(parts.values()),))


def _held(region: Region, graph: fx.Graph, value: Any) -> fx.Node:
    """Read a value that is no tensor from an attribute of the module."""
    stem = f"held_{value.__name__ if isinstance(value, type) else type(value).__name__}"
    name, number = stem, 0
    while getattr(region.owner, name, value) is not value:
        name, number = f"{stem}_{number}", number + 1
    setattr(region.owner, name, value)
    return graph.create_node("get_attr", name)
