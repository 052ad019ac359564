"""Views: the graphs of a model that run in one mode, as one tree of groups.

The parts of a model that Python runs are groups as well, so that a model of many regions shows its own structure: which
modules are graphs, and which single layers and opaque modules Python calls in between.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from fedmef_fx.inspection.page.hierarchy import Box, Folded, Group, fold, nest
from fedmef_fx.inspection.page.layout import Flow
from fedmef_fx.inspection.table import LayerRow
from fedmef_fx.records.calls import CallRecord
from fedmef_fx.records.graphs import GraphRecord

__all__ = ["FALLBACK", "OPAQUE", "View", "units_in", "views_of"]

OPAQUE: Final = "opaque:"
"""Start of the name of a box that stands for a module without a graph; the module's path follows."""

FALLBACK: Final = "fallback"
"""How the group is run that holds the layers inside regions, for calls in which Python runs instead of the region."""


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """What runs in one mode.

    Attributes:
        mode: "train", "eval", or "both" where the modes run the same.
        graphs: The graphs.
        folded: What is drawn of each of them.
        root: The model.
        flow: What flows between the modules that Python calls; None where that is not known.
        stand_ins: Indices of the graphs of single layers inside regions. Their weights are those of the regions, where
            they are shown.
    """

    mode: str
    graphs: tuple[GraphRecord, ...]
    folded: tuple[Folded, ...]
    root: Group
    flow: Flow | None = None
    stand_ins: frozenset[int] = frozenset()


def units_in(member: Box | Group) -> Iterator[str]:
    """Paths of the modules that Python calls, a member itself or what it holds."""
    if member.unit:
        yield member.unit
    elif isinstance(member, Group):
        for inner in member.members:
            yield from units_in(inner)


def views_of(
    graphs: Sequence[GraphRecord], rows: Iterable[LayerRow], calls: CallRecord | None = None
) -> tuple[View, ...]:
    """A view for each mode in which a model runs differently.

    Args:
        graphs: All graphs.
        rows: The table of layers: it names the parameters that no graph reads.
        calls: What flowed between the modules that Python calls.
    """
    modes = [mode for mode in ("eval", "train") if any(graph.mode == mode for graph in graphs)]
    opaque = _opaque(graphs, rows)
    return tuple(
        _view(mode, tuple(graph for graph in graphs if graph.mode in ("both", mode)), opaque, calls)
        for mode in (modes or ["both"])
    )


def _opaque(graphs: Iterable[GraphRecord], rows: Iterable[LayerRow]) -> tuple[str, ...]:
    """Modules with parameters that no graph reads."""
    read = {node.target for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    called = {node.target for graph in graphs for node in graph.nodes if node.op == "call_module"}
    names = (row.parameter for row in rows if row.parameter not in read)
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return tuple(path for path in modules if not any(f"{path}.".startswith(f"{module}.") for module in called))


def _view(mode: str, graphs: tuple[GraphRecord, ...], opaque: Sequence[str], calls: CallRecord | None) -> View:
    folded = tuple(map(fold, graphs))
    if len(graphs) == 1 and not graphs[0].region:
        return View(mode, graphs, folded, Group("", "", "model", nest(folded[0]), graph=0))
    regions = {graph.region for graph in graphs}
    seen: dict[str, int] = {}
    parts: list[tuple[tuple[str, ...], Box | Group]] = []
    fallbacks: list[Group] = []
    stand_ins: set[int] = set()
    for index, (graph, boxes) in enumerate(zip(graphs, folded, strict=True)):
        seen[graph.region] = seen.get(graph.region, 0) + 1
        key = f"{graph.region}#{seen[graph.region]}"
        path = tuple(graph.region.split(".")) if graph.region else ("forward",)
        # The same module for another kind of call: its boxes would otherwise look like a second module.
        note = f"call {seen[graph.region]}" if seen[graph.region] > 1 else ""
        members = nest(boxes, region=graph.region)
        group = Group(key, graph.region, path[-1], members, note=note, graph=index, unit="" if note else graph.region)
        if any(graph.region.startswith(f"{region}.") if region else graph.region for region in regions):
            stand_ins.add(index)
            fallbacks.append(dataclasses.replace(group, label=graph.region))
        else:
            parts.append((path, _without_ports(group)))
    parts += [
        (tuple(path.split(".")), Box(f"{OPAQUE}{path}", path.rpartition(".")[2], "opaque", unit=path))
        for path in opaque
        if path
    ]
    if calls is not None:
        last = len(calls.order)
        place = {path: index for index, path in enumerate(calls.order)}
        parts.sort(key=lambda part: place.get(part[1].unit, last))
    top = _python_tree(parts, "")
    if fallbacks:
        note = "where Python runs instead"
        top = (*top, Group("#fallbacks", "", "fallbacks", tuple(fallbacks), runs=FALLBACK, note=note))
    root = Group("", "", "model", top, runs="python")
    flow = None if calls is None else _flow(calls, set(units_in(root)))
    return View(mode, graphs, folded, root, flow, frozenset(stand_ins))


def _flow(calls: CallRecord, drawn: Collection[str]) -> Flow:
    """What flows between modules that are drawn; what is not drawn in between passes its values on."""
    sources: dict[str, set[str]] = {}
    for source, target in calls.flows:
        sources.setdefault(target, set()).add(source)

    def origins(path: str, seen: frozenset[str]) -> set[str]:
        reached = (
            ({source} if source in drawn or not source else origins(source, seen | {source}))
            for source in sources.get(path, set()) - seen
        )
        return set().union(*reached)

    inputs = {path: sorted(origins(path, frozenset())) for path in drawn}
    flow = Flow.of({**inputs, "": []})
    ends = {path: [""] for path in origins("", frozenset()) if path}
    return Flow(inputs, {path: [*flow.users[path], *ends.get(path, ())] for path in drawn})


def _without_ports(region: Group) -> Box | Group:
    """A region that is a single layer as this layer: its input and output go without saying."""
    ports = {"placeholder", "output"}
    inside = [member for member in region.members if isinstance(member, Group) or member.op not in ports]
    if len(inside) == 1 and isinstance(inside[0], Box) and not region.note:
        return dataclasses.replace(inside[0], label=region.label, graph=region.graph, unit=region.unit)
    return region


def _python_tree(parts: Sequence[tuple[tuple[str, ...], Box | Group]], prefix: str) -> tuple[Box | Group, ...]:
    """Parts with their remaining paths as nested groups; modules stand where their first part does."""
    members: list[Box | Group] = []
    by_head: dict[str, list[tuple[tuple[str, ...], Box | Group]]] = {}
    for (head, *rest), part in parts:
        by_head.setdefault(head, []).append((tuple(rest), part))
    for head, inside in by_head.items():
        members += (part for below, part in inside if not below)
        deeper = [(below, part) for below, part in inside if below]
        if not deeper:
            continue
        path = f"{prefix}.{head}" if prefix else head
        held = _python_tree(deeper, path)
        if len(held) == 1:
            members.append(dataclasses.replace(held[0], label=f"{head}.{held[0].label}"))
        else:
            members.append(Group(f"{path}#python", path, head, held, runs="python"))
    return tuple(members)
