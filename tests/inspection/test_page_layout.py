"""Where boxes stand: nesting by module, rows that only go down, lanes for what skips rows."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.inspection import GraphRecord, NodeRecord, inspect
from fedmef_fx.inspection.page.hierarchy import Box, Group, fold, nest
from fedmef_fx.inspection.page.layout import ENTRY, EXIT, Edge, Flow, Placement, plan
from fedmef_fx.inspection.page.views import OPAQUE, views_of
from fedmef_fx.models import resnet18
from tests.inspection.models import Encoder, PerMode, two_convolutions


def _tree(members: tuple[Box | Group, ...]) -> list[object]:
    return [m.label if isinstance(m, Box) else (m.label, _tree(m.members)) for m in members]


def _resnet() -> GraphRecord:
    return inspect(fedmef_fx.transform(resnet18(), Config(density=0.5, weight_storage="dense"))).graphs[0]


def test_weights_masks_and_packing_fold_into_the_layers_that_use_them() -> None:
    graph = inspect(fedmef_fx.transform(two_convolutions(), Config(density=0.5, weight_storage="dense"))).graphs[0]
    folded = fold(graph)
    assert _tree(nest(folded)) == ["input", "conv1", "relu1", "conv2", "output"]
    boxes = {node.name for node in folded.boxes}
    assert folded.hosts.keys() | boxes == {node.name for node in graph.nodes}
    assert all(set(hosts) <= boxes for hosts in folded.hosts.values())


def test_modules_nest_and_a_module_called_twice_is_two_boxes() -> None:
    by_label = {m.label: m for m in nest(fold(_resnet())) if isinstance(m, Group)}
    assert list(by_label) == ["layer1", "layer2", "layer3", "layer4"]
    block = by_label["layer2"].members[0]
    assert isinstance(block, Group)
    assert block.path == "layer2.0"
    labels = ["conv1", "relu", "conv2", "downsample.0", "add_over", "mul_over", "relu"]
    assert [m.label for m in block.members] == labels


def test_a_block_has_its_chain_in_one_column_and_the_shortcut_beside_it() -> None:
    folded = fold(_resnet())
    flow = Flow.of(folded.inputs)
    layer1, layer2 = (m for m in nest(folded) if isinstance(m, Group) and m.label in ("layer1", "layer2"))
    projected = plan(layer2.members[0].members, flow)
    assert projected.cells == ((0, 0), (1, 0), (2, 0), (0, 1), (3, 0), (4, 0), (5, 0))
    assert Edge(3, 4, column=1) in projected.edges  # the projection goes down in its own column
    identity = plan(layer1.members[0].members, flow)
    assert (identity.columns, identity.lanes) == (1, 1)
    assert Edge(ENTRY, 3, lane=0) in identity.edges  # the shortcut skips both convolutions


def test_what_is_not_a_graph_stands_between_the_graphs() -> None:
    ids = torch.randint(50, (2, 6))
    sparse = fedmef_fx.transform(Encoder(), Config(density=0.5, weight_storage="dense"), example_inputs=(ids,))
    (view,) = views_of(inspect(sparse).graphs, inspect(sparse).layers.rows)
    assert view.root.runs == "python"
    layers, classifier, pooler, fallbacks = view.root.members
    assert isinstance(layers, Group)
    assert layers.runs == "python"
    assert [m.label for m in layers.members] == ["0", "1"]
    assert classifier.label == "classifier"
    assert pooler == Box(f"{OPAQUE}pooler", "pooler", "opaque")
    assert isinstance(fallbacks, Group)
    assert fallbacks.runs == "fallback"


def test_modes_that_differ_are_two_views() -> None:
    found = inspect(fedmef_fx.transform(PerMode(), Config(density=0.5, weight_storage="dense")))
    assert [view.mode for view in views_of(found.graphs, found.layers.rows)] == ["eval", "train"]


@st.composite
def _graphs(draw: st.DrawFn) -> GraphRecord:
    """Graphs of any shape; modules come from few names, so that they are left and entered again."""
    count = draw(st.integers(1, 14))
    nodes = []
    for index in range(count):
        inputs = draw(st.lists(st.integers(0, index - 1), max_size=3, unique=True)) if index else []
        path = ".".join(draw(st.lists(st.sampled_from("abc"), max_size=3)))
        op = "call_function" if inputs else "placeholder"
        nodes.append(NodeRecord(f"n{index}", op, "f", inputs=tuple(f"n{i}" for i in inputs), module=path))
    return GraphRecord("", "both", tuple(nodes))


def _plans(members: tuple[Box | Group, ...], flow: Flow) -> list[tuple[tuple[Box | Group, ...], Placement]]:
    inner = [_plans(m.members, flow) for m in members if isinstance(m, Group)]
    return [(members, plan(members, flow)), *itertools.chain.from_iterable(inner)]


@given(_graphs())
def test_every_box_is_placed_once_and_every_value_flows_down(graph: GraphRecord) -> None:
    folded = fold(graph)
    tree = nest(folded)
    placed = [b.name for members, _ in _plans(tree, Flow.of(folded.inputs)) for b in members if isinstance(b, Box)]
    assert sorted(placed) == sorted(node.name for node in folded.boxes)
    for members, places in _plans(tree, Flow.of(folded.inputs)):
        assert len(set(places.cells)) == len(members)
        last = max((row for row, _ in places.cells), default=0) + 1
        for edge in places.edges:
            top = -1 if edge.source == ENTRY else places.cells[edge.source][0]
            bottom = last if edge.target == EXIT else places.cells[edge.target][0]
            assert top < bottom
            if edge.column is not None:  # no box stands in its way
                assert not {(row, edge.column) for row in range(top + 1, bottom)} & set(places.cells)
            if edge.column is edge.lane is None:
                assert bottom == top + 1


@given(_graphs())
def test_every_value_is_drawn_in_the_innermost_group_of_both_ends(graph: GraphRecord) -> None:
    folded = fold(graph)
    drawn = 0
    for members, places in _plans(nest(folded), Flow.of(folded.inputs)):
        drawn += sum(isinstance(members[e.source], Box) and e.source >= 0 and e.target >= 0 for e in places.edges)
        assert all(e.lane is None or 0 <= e.lane < places.lanes for e in places.edges)
        lanes = [(e.lane, e.source, e.target) for e in places.edges if e.lane is not None]
        assert len(set(lanes)) == len(lanes)
    assert drawn >= sum(
        folded.paths[source] == folded.paths[node.name] == ""
        for node in folded.boxes
        for source in folded.inputs[node.name]
    )
