"""Which room may import which: read from the source, imports inside functions and for types alone included."""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fedmef_fx"

# From the ground up: a room imports itself and what stands before it. "" is the package itself, which users import.
ROOMS = [
    "moved",
    "errors",
    "module_tree",
    "display",
    "data",
    "models",
    "sparsity",
    "native",
    "packing",
    "records",
    "config",
    "files",
    "ops",
    "sparse_model",
    "graph",
    "capture",
    "training",
    "measure",
    "passes",
    "export",
    "budget",
    "transformation",
    "fitting",
    "federated",
    "checkpoint",
    "inspection",
    "",
    "commands",
    "cli",
    "__main__",
]
EXPORTS_ROOMS = ["results", "sizes", "examples", "freeze", "compact", "onnx", "training"]


@functools.cache
def _sources() -> dict[str, str]:
    """Text of every module by its dotted name; rglob does not follow the links to passes/ and export/."""
    found = {}
    for folder in (PACKAGE, "passes", "export"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


@functools.cache
def _names(source: str) -> tuple[str, ...]:
    """Dotted name of everything that a module imports, or reaches through an attribute of torch."""
    return tuple(_found_names(source))


def _found_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                # `from fedmef_fx import passes` names a module as much as `import fedmef_fx.passes` does.
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield name
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                yield f"torch.{name}"
            case _:
                pass


def _graph(sources: Mapping[str, str]) -> "networkx.DiGraph[str]":
    """Modules, and an arrow from each to what it imports: modules of the project, and other names as they stand."""
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(sources)
    for module, source in sources.items():
        for name in _names(source):
            own = name if name in sources else name.rpartition(".")[0]
            graph.add_edge(module, own if own in sources else name)
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    return graph


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def _circles(sources: Mapping[str, str]) -> list[list[str]]:
    return [sorted(part) for part in networkx.strongly_connected_components(_graph(sources)) if len(part) > 1]


def _upwards(sources: Mapping[str, str]) -> list[str]:
    """Imports of a room that stands higher up."""
    edges = [(a, b) for a, b in _graph(sources).edges if b in sources]
    return [f"{a} imports {b}" for a, b in edges if ROOMS.index(_room(a)) < ROOMS.index(_room(b))]


def _reached(sources: Mapping[str, str], room: str, forbidden: str) -> list[str]:
    """The way from a module of a room to a forbidden name, through all imports, one way per module."""
    graph = _graph(sources)
    ends = [name for name in graph if f"{name}.".startswith(f"{forbidden}.")]
    ways = []
    for module in (name for name in sources if _room(name) == room):
        for end in ends:
            if networkx.has_path(graph, module, end):
                ways.append(" -> ".join(networkx.shortest_path(graph, module, end)))
                break
    return ways


def test_every_module_stands_in_a_room() -> None:
    assert {_room(module) for module in _sources()} == set(ROOMS)


def test_the_root_holds_few_modules() -> None:
    assert len([path for path in (ROOT / PACKAGE).glob("*.py") if path.name != "__init__.py"]) <= 8


def test_no_import_leads_back_to_where_it_started() -> None:
    assert _circles(_sources()) == []


def test_imports_go_downwards() -> None:
    assert _upwards(_sources()) == []


def test_the_rooms_of_the_exporter_stand_in_order() -> None:
    sources = {name: text for name, text in _sources().items() if name.startswith(f"{PACKAGE}.export.")}
    for module, other in _graph(sources).edges:
        if other in sources:
            here, there = (EXPORTS_ROOMS.index(name.split(".")[2]) for name in (module, other))
            assert there <= here, f"{module} imports {other}"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("sparsity", "torch.fx"),
        ("packing", "torch.fx"),
        ("federated", "fedmef_fx.export"),
        ("federated", "fedmef_fx.inspection"),
    ],
)
def test_reaches_nothing_forbidden_through_any_import(room: str, forbidden: str) -> None:
    assert _reached(_sources(), room, forbidden) == []


@pytest.mark.parametrize(("room", "forbidden"), [("federated", "torch.fx"), ("federated", "fedmef_fx.passes")])
def test_does_not_import_itself(room: str, forbidden: str) -> None:
    sources = {name: text for name, text in _sources().items() if _room(name) == room}
    assert _reached(sources, room, forbidden) == []


def test_only_the_adapter_knows_flower() -> None:
    users = [module for module, source in _sources().items() if any(n.startswith("flwr") for n in _names(source))]
    assert [module for module in users if not module.startswith("fedmef_fx.federated.flower")] == []


def test_imports_are_absolute() -> None:
    assert [module for module, source in _sources().items() if any(n.startswith(".") for n in _names(source))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.fx",
        "import torch.fx.passes.shape_prop as shapes",
        "from torch import fx",
        "from torch.fx import GraphModule",
        "import torch\ngraph = torch.fx.Graph()",
        "def build():\n    from torch.fx.graph import Graph\n    return Graph()",
        "import importlib\nfx = importlib.import_module('torch.fx')",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import fx",
        "from fedmef_fx.errors import helper",
    ],
)
def test_the_check_sees_every_way_to_reach_something(source: str) -> None:
    sources = {"fedmef_fx.packing.codec": source, "fedmef_fx.errors": "from torch.fx import Graph"}
    (way,) = _reached(sources, "packing", "torch.fx")
    assert way.startswith("fedmef_fx.packing.codec -> ")


@pytest.mark.parametrize(
    "source", ["import torch", "from torch import Tensor", "import torch.fxtra", "fx = 'torch.fx'"]
)
def test_the_check_leaves_the_rest_alone(source: str) -> None:
    assert _reached({"fedmef_fx.packing.codec": source}, "packing", "torch.fx") == []


def test_the_check_sees_circles_and_imports_upwards() -> None:
    sources = {
        "fedmef_fx.errors": "def late():\n    from fedmef_fx.graph import nodes",
        "fedmef_fx.graph": "",
        "fedmef_fx.graph.nodes": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedmef_fx.errors",
    }
    assert _circles(sources) == [["fedmef_fx.errors", "fedmef_fx.graph.nodes"]]
    assert _upwards(sources) == ["fedmef_fx.errors imports fedmef_fx.graph.nodes"]


@pytest.mark.parametrize(
    "source", ["from . import config", "from .config import Config", "from ..errors import PassError"]
)
def test_the_check_sees_relative_imports(source: str) -> None:
    assert any(name.startswith(".") for name in _names(source))
