"""The document of a page: everything that it shows, as JSON values. Keys are short where they are repeated often."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fedmef_fx.config import Config
from fedmef_fx.graph.text import node_text
from fedmef_fx.inspection.page.about import about
from fedmef_fx.inspection.page.changes import Changes
from fedmef_fx.inspection.page.hierarchy import Box, Group
from fedmef_fx.inspection.page.layout import Flow, plan
from fedmef_fx.inspection.page.mask_image import data_url
from fedmef_fx.inspection.page.memory_hint import memory_hint
from fedmef_fx.inspection.page.timeline import MemoryPair
from fedmef_fx.inspection.page.views import OPAQUE, View, units_in, views_of
from fedmef_fx.inspection.pass_colours import colour_of
from fedmef_fx.inspection.table import LayerRow, Table
from fedmef_fx.inspection.weights import WeightRecord
from fedmef_fx.records.calls import CallRecord
from fedmef_fx.records.graphs import GraphRecord, NodeRecord
from fedmef_fx.records.passes import PassReport

if TYPE_CHECKING:
    from fedmef_fx.federated.history import History
    from fedmef_fx.federated.rounds import RoundRecord

__all__ = ["PageContent", "page_document"]

# All pictures together take about 1 MB of the page: 4 bits a pixel, which noise fills almost completely, and base64.
_PIXELS: Final = 1_500_000
_MOST_PIXELS: Final = 40_000
_FEWEST_PIXELS: Final = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageContent:
    """What a page shows.

    Attributes:
        title: Its heading.
        after: The graphs of the model.
        before: Those of the original; empty where they are not known.
        calls: What flows between the modules that Python calls, if that is known.
        calls_before: The same of the original.
        layers: The table of layers.
        weights: Snapshots of the parameters in that table.
        passes: What the passes did and refused.
        notices: What could not be found out, and why.
        memory: Bytes over a training step.
        history: Rounds of a training.
        comparison: What changed from one state of a model to another, as `Comparison.as_dict` gives it.
        config: What the model was transformed with.
        command: The command line that writes the page.
        stored: Name of a tensor in a file -> its codec and its bytes there.
    """

    title: str
    after: Sequence[GraphRecord] = ()
    before: Sequence[GraphRecord] = ()
    calls: CallRecord | None = None
    calls_before: CallRecord | None = None
    layers: Table = dataclasses.field(default_factory=lambda: Table(()))
    weights: Sequence[WeightRecord] = ()
    passes: PassReport = dataclasses.field(default_factory=lambda: PassReport(()))
    notices: Sequence[str] = ()
    memory: MemoryPair | None = None
    history: "History | None" = None
    comparison: Mapping[str, Any] | None = None
    config: Config | None = None
    command: str | None = None
    stored: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)


def page_document(content: PageContent) -> dict[str, Any]:
    """Everything that a page shows, as JSON values."""
    parameters = {row.parameter: index for index, row in enumerate(content.layers.rows)}
    changes = Changes.between(content.before, content.after, content.passes, parameters)
    views = [
        _view(view, when, parameters, changes)
        for when, graphs, calls in (
            ("before", content.before, content.calls_before),
            ("after", content.after, content.calls),
        )
        if graphs
        for view in views_of(graphs, content.layers.rows if when == "after" else (), calls)
    ]
    masked = sum(record.mask_bits is not None for record in content.weights)
    pixels = max(_FEWEST_PIXELS, min(_MOST_PIXELS, _PIXELS // max(masked, 1)))
    snapshots = {record.parameter: record for record in content.weights}
    return {
        "title": content.title,
        "passes": [
            {
                "name": result.name.partition("{")[0],
                "colour": colour_of(result.name.partition("{")[0]),
                "options": result.name.partition("{")[2].removesuffix("}"),
                "rewrites": len(result.rewrites),
                "refusals": [[refusal.where, refusal.reason] for refusal in result.refusals],
            }
            for result in content.passes
        ],
        "parameters": [
            _parameter(row, snapshots.get(row.parameter), pixels) | _stored(content.stored.get(row.parameter))
            for row in content.layers.rows
        ],
        "notices": list(content.notices),
        "saved": [content.layers.total.saved, content.layers.total.saved_before],
        "views": views,
        "memory": content.memory
        and {
            "after": content.memory.after.as_dict(),
            "before": content.memory.before and content.memory.before.as_dict(),
            "hint": memory_hint(content.memory.after, content.layers, content.config),
        },
        "about": about(content.config, content.command),
        "history": _history(content.history),
        "comparison": content.comparison,
    }


def _parameter(row: LayerRow, record: WeightRecord | None, pixels: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(row).items()
    }
    if record is None:
        return entry
    histogram, picture = record.histogram(), record.picture(pixels)
    if histogram is not None:
        entry["histogram"] = [histogram.low, histogram.high, histogram.counts]
        entry["sample"] = record.is_sample
    entry["threshold"], entry["rate"] = record.threshold(), record.adjustment_rate
    if picture is not None:
        height, width = picture.levels.shape
        entry["mask"] = {
            "url": data_url(picture),
            "size": [width, height],
            "weights": [picture.columns, picture.rows],
            "step": [picture.column_step, picture.row_step],
            "brightest": picture.brightest,
        }
    return entry


def _stored(stored: tuple[str, int] | None) -> dict[str, Any]:
    return {} if stored is None else {"codec": stored[0], "nbytes": stored[1]}


def _history(history: "History | None") -> dict[str, Any] | None:
    if history is None:
        return None
    return {"settings": history.settings, "rounds": [_drawable(record) for record in history.rounds]}


def _view(view: View, when: str, parameters: Mapping[str, int], changes: Changes) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    ids: list[dict[str, int]] = []
    drawn = {
        node.target
        for index, graph in enumerate(view.graphs)
        for node in graph.nodes
        if index not in view.stand_ins and node.op in ("get_attr", "call_module")
    }
    for index, (graph, folded) in enumerate(zip(view.graphs, view.folded, strict=True)):
        start = len(nodes)
        shown = parameters
        if index in view.stand_ins:
            shown = {n: at for n, at in parameters.items() if drawn.isdisjoint((n, n.rpartition(".")[0]))}
        places = {node.name: start + index for index, node in enumerate(graph.nodes)}
        ids.append(places)
        for node in graph.nodes:
            touched = changes.passes(when, graph, node)
            hosts = [places[name] for name in folded.hosts.get(node.name, ())]
            nodes.append(_node(node, graph, places, hosts, touched, shown))
    opaque = {name: len(nodes) + index for index, name in enumerate(_opaque_boxes(view.root))}
    for name in opaque:
        path = name.removeprefix(OPAQUE)
        own = [index for parameter, index in parameters.items() if parameter.rpartition(".")[0] == path]
        nodes.append({"n": path, "o": "opaque", "x": path, "m": path, "w": own})
    flows = [Flow.of(folded.inputs) for folded in view.folded]
    root = _group(view.root, None, [*flows, view.flow], ids, opaque)
    return {"when": when, "mode": view.mode, "nodes": nodes, "root": root}


def _opaque_boxes(part: Box | Group) -> Iterable[str]:
    if isinstance(part, Box):
        if part.name.startswith(OPAQUE):
            yield part.name
        return
    for member in part.members:
        yield from _opaque_boxes(member)


def _group(
    group: Group,
    graph: int | None,
    flows: Sequence[Flow | None],
    ids: Sequence[Mapping[str, int]],
    opaque: Mapping[str, int],
) -> dict[str, Any]:
    graph = graph if group.graph is None else group.graph
    # The last flow is that between the modules that Python calls.
    places = plan(group.members, flows[-1], units_in) if graph is None else plan(group.members, flows[graph])
    return {
        "k": group.key,
        "p": group.path,
        "l": group.label,
        "run": group.runs,
        "note": group.note,
        "c": [
            _group(member, graph, flows, ids, opaque)
            if isinstance(member, Group)
            else {"i": _id(member, graph, ids, opaque), "l": member.label}
            for member in group.members
        ],
        "at": places.cells,
        "e": [[edge.source, edge.target, edge.column, edge.lane] for edge in places.edges],
        "cols": places.columns,
        "lanes": places.lanes,
    }


def _id(box: Box, graph: int | None, ids: Sequence[Mapping[str, int]], opaque: Mapping[str, int]) -> int:
    at = graph if box.graph is None else box.graph
    return opaque[box.name] if at is None else ids[at][box.name]


def _node(
    node: NodeRecord,
    graph: GraphRecord,
    places: Mapping[str, int],
    hosts: Sequence[int],
    touched: Sequence[int],
    parameters: Mapping[str, int],
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "n": node.name,
        "o": node.op,
        "x": node.target,
        "code": node_text(node),
        "m": node.module,
        "r": graph.region,
        "in": [places[name] for name in node.inputs],
        "s": [[tensor.dtype, list(tensor.shape)] for tensor in node.tensors],
        "sv": [[saved.codec, saved.nbytes, saved.counted_at] for saved in node.saved or ()],
        "h": hosts,
        "by": node.made_by,
        "from": node.origin,
        "ch": list(touched),
    }
    if node.op == "get_attr" and node.target in parameters:
        entry["w"] = [parameters[node.target]]
    elif node.op == "call_module":
        # A layer that a graph calls whole reads its parameters without nodes of their own.
        entry["w"] = [index for name, index in parameters.items() if name.rpartition(".")[0] == node.target]
    return {key: value for key, value in entry.items() if value not in (None, [], "")}


def _drawable(record: "RoundRecord") -> dict[str, Any]:
    """A round with gaps where a number is not finite: a curve has no place for it, and JSON none, either."""
    fields = dataclasses.asdict(record)
    return {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in fields.items()}
