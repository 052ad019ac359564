"""From a flat graph to nested modules, and which nodes stand as boxes of their own.

1. A node that reads a parameter or a buffer, and one that computes with those alone (masking, normalising a kernel), is
   folded into the nodes that use it. A packing site is folded into the node whose value it packs, and so are nodes that
   only carry a value on (see `plumbing`).
2. What is left keeps its order of execution. Neighbours in this order that belong to one module form a group, and so on
   inwards. A module that is called twice makes two groups, so that no group ever depends on itself.
3. A group of one node is that node, with the module's name; groups that hold one group only are joined to one.
"""

import collections
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

from fedmef_fx.graph.sites import is_in_site
from fedmef_fx.inspection.page.plumbing import facts_in, is_part
from fedmef_fx.records.graphs import GraphRecord, NodeRecord

__all__ = ["Box", "Folded", "Group", "fold", "nest"]


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A node that is drawn.

    Attributes:
        name: Of the node.
        label: What is written on it.
        op: Kind of node.
        graph: Index of the graph that the node belongs to; None where the group around it says so, or in no graph.
        unit: Path of the module that Python calls, if the box is one.
    """

    name: str
    label: str
    op: str
    graph: int | None = None
    unit: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """A module, or a part of its run, with what it holds in order of execution.

    Attributes:
        key: Unique in a view, and the same before and after a transformation if possible.
        path: Name of the module.
        label: What is written on it: the part of the path that its parent does not show.
        members: What it holds.
        runs: What runs it: its "graph", or "python" where the model's own forward calls its parts; "fallback" for what
            holds the layers that stand in for parts of graphs.
        note: Shown next to the label.
        graph: Index of the graph whose nodes the boxes in it are; None where its parent's says so, or nothing does.
        unit: Path of the module that Python calls, if the group is one.
    """

    key: str
    path: str
    label: str
    members: tuple["Box | Group", ...]
    runs: str = "graph"
    note: str = ""
    graph: int | None = None
    unit: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Folded:
    """A graph without the nodes that are folded away.

    Attributes:
        boxes: The nodes that are left, in order.
        paths: Module of each of them.
        inputs: Boxes that each of them reads, each once.
        hosts: Folded node -> boxes that it is folded into.
    """

    boxes: tuple[NodeRecord, ...]
    paths: Mapping[str, str]
    inputs: Mapping[str, tuple[str, ...]]
    hosts: Mapping[str, tuple[str, ...]]


def fold(graph: GraphRecord) -> Folded:
    """Decide which nodes of a graph are drawn, where they belong and what they read."""
    nodes = {node.name: node for node in graph.nodes}
    users: dict[str, list[str]] = {name: [] for name in nodes}
    for node in graph.nodes:
        for source in node.inputs:
            users[source].append(node.name)
    facts = facts_in(graph.nodes)
    constant = _constants(graph.nodes, users, facts)
    hosts: dict[str, tuple[str, ...]] = {}
    for node in reversed(graph.nodes):
        if node.name in constant:
            targets = (hosts.get(user, (user,)) for user in users[node.name])
            hosts[node.name] = tuple(dict.fromkeys(itertools.chain.from_iterable(targets)))
    for node in graph.nodes:
        if node.name in constant or not users[node.name]:
            continue
        carried = _carried(node, facts, constant)
        if carried is not None:
            hosts[node.name] = hosts.get(carried, (carried,))
    boxes = tuple(node for node in graph.nodes if node.name not in hosts)
    inputs = {
        node.name: tuple(
            dict.fromkeys(
                source
                for name in _values_of(node, facts)
                if name not in constant
                for source in hosts.get(name, (name,))
                if source != node.name
            )
        )
        for node in boxes
    }
    return Folded(boxes, _paths(graph, boxes, inputs), inputs, hosts)


def _carried(node: NodeRecord, facts: Collection[str], constant: Collection[str]) -> str | None:
    """The node whose value this one only packs or carries on; None where it does something of its own."""
    if _is_site(node) or (node.name in facts and node.inputs):
        return node.inputs[0]
    values = [name for name in node.inputs if name not in facts and name not in constant]
    return values[0] if is_part(node) and len(values) == 1 else None


def _values_of(node: NodeRecord, facts: Collection[str]) -> Sequence[str]:
    """What a node reads, without sizes and the like where it reads anything else."""
    return [name for name in node.inputs if name not in facts] or node.inputs


def _constants(nodes: Sequence[NodeRecord], users: Mapping[str, Sequence[str]], facts: Collection[str]) -> set[str]:
    """Nodes that depend on no input of the graph, sizes aside, and that something uses which does."""
    constant: set[str] = set()
    for node in nodes:
        values = [name for name in node.inputs if name not in facts or name in constant]
        made_of_constants = node.op.startswith("call") and values and constant.issuperset(values)
        reads_nothing = not node.inputs and (
            node.name in facts or (node.op == "call_module" and is_in_site(node.target))
        )
        if (node.op == "get_attr" or reads_nothing or made_of_constants) and users[node.name]:
            constant.add(node.name)
    outputs = {node.name for node in nodes if node.op == "output"}
    for node in reversed(nodes):
        # A constant that is a result of the model stays visible.
        if node.name in constant and outputs.issuperset(users[node.name]):
            constant.discard(node.name)
    return constant


def _is_site(node: NodeRecord) -> bool:
    return node.op == "call_module" and is_in_site(node.target) and len(node.inputs) == 1


def _paths(graph: GraphRecord, boxes: Sequence[NodeRecord], inputs: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Module of each box; a node that a pass made without a module of its own stays beside what it reads."""
    held = collections.Counter(node.module for node in boxes)
    parents = {parent for path in held for parent in _parents(path)}
    paths: dict[str, str] = {}
    for node in boxes:
        path = node.module
        if node.made_by is not None and path == graph.region and inputs[node.name]:
            path = paths[inputs[node.name][0]]
            is_single_layer = held[path] == 1 and path not in parents
            path = path.rpartition(".")[0] if is_single_layer and path != graph.region else path
        paths[node.name] = path
    return paths


def _parents(path: str) -> Iterable[str]:
    parts = path.split(".")
    return (".".join(parts[:depth]) for depth in range(len(parts)))


def nest(folded: Folded, *, region: str = "") -> tuple[Box | Group, ...]:
    """The boxes of a graph as nested groups.

    Args:
        folded: The graph.
        region: Path of the module that the graph belongs to.

    Returns:
        What stands in that module, in order of execution.
    """
    depth = len(_parts(region))
    items = [(node, _parts(folded.paths[node.name])[depth:]) for node in folded.boxes]
    return _nest(items, region, {})


def _nest(
    items: Sequence[tuple[NodeRecord, tuple[str, ...]]], prefix: str, seen: dict[str, int]
) -> tuple[Box | Group, ...]:
    members: list[Box | Group] = []
    for head, run in itertools.groupby(items, key=lambda item: item[1][:1]):
        inside = list(run)
        if not head:
            members += (Box(node.name, _operation(node), node.op) for node, _ in inside)
            continue
        path = f"{prefix}.{head[0]}" if prefix else head[0]
        if len(inside) == 1:
            node, parts = inside[0]
            members.append(Box(node.name, ".".join(parts), node.op))
            continue
        seen[path] = seen.get(path, 0) + 1
        key = f"{path}#{seen[path]}"
        held = _nest([(node, parts[1:]) for node, parts in inside], path, seen)
        if len(held) == 1 and isinstance(held[0], Group):
            members.append(dataclasses.replace(held[0], label=f"{head[0]}.{held[0].label}"))
        else:
            members.append(Group(key, path, head[0], held))
    return tuple(members)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(path.split(".")) if path else ()


def _operation(node: NodeRecord) -> str:
    return node.target if node.op in ("placeholder", "call_function", "call_method") else node.op
