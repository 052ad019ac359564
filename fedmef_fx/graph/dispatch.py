"""Dispatch: a module that runs the graph that serves a call, and its original forward where there is none."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch
from torch import nn

from fedmef_fx.graph.compiled import (
    ORIGINAL_FORWARD,
    CompiledGraph,
    TransformedModule,
    original_class,
    original_forward,
)
from fedmef_fx.graph.containers import container_methods
from fedmef_fx.graph.hooks import make_plain, remove_parametrizations
from fedmef_fx.graph.program import Region, Role
from fedmef_fx.graph.signature import AnyCall, AnyTensors, Call, Signature
from fedmef_fx.graph.switches import Switch, is_turned_on, pass_of_graphs_alone, refuse_switch, switches_in
from fedmef_fx.graph.watch import Watch
from fedmef_fx.packing.tracers import is_traced, refuse_tracers, uncompiled
from fedmef_fx.records.graphs import GraphMode
from fedmef_fx.sparse_model.current_layers import adopt_pruned
from fedmef_fx.sparse_model.gradient_masks import clear_before_python

__all__ = [
    "RegionTable",
    "add_layer",
    "capture_when_called",
    "forget_graphs",
    "forget_later_hooks",
    "paused_regions",
    "renew_graphs",
    "tables_in",
]


_TABLE: Final = "_fedmef_regions"


Extend: TypeAlias = Callable[[nn.Module, "RegionTable", Call | None], None]


@dataclasses.dataclass
class _Entry:
    """The graphs that serve one kind of call."""

    signature: Signature | AnyTensors | AnyCall
    by_name: bool
    role: Role
    graphs: dict[GraphMode, CompiledGraph]

    def graph_for(self, *, training: bool) -> CompiledGraph | None:
        return self.graphs.get("both") or self.graphs.get("train" if training else "eval")


@dataclasses.dataclass
class RegionTable:
    """What a region's owner runs.

    Attributes:
        path: Name of the owner in the model.
        entries: Graphs by kind of call.
        extend: Captures another kind of call when it is first made, and adds it here; without a call what it can
            without one. None for layers.
        attempts: How many more kinds of call may be tried.
        only_graph: The graph that serves all calls in both modes, if there is one.
        switches: Switches for activation checkpointing that were off when it was captured.
        graphs_alone: A pass that changed what its graphs compute, but not what Python does; else empty.
        watch: What the graphs were made from; None for layers, and where nothing can be captured again.
        serves_all: Whether its graphs are meant for all calls.
        is_paused: Whether the original forward runs for a moment.
    """

    path: str
    entries: list[_Entry] = dataclasses.field(default_factory=list)
    extend: Extend | None = None
    attempts: int = 4
    only_graph: CompiledGraph | None = None
    switches: tuple[Switch, ...] = ()
    graphs_alone: str = ""
    watch: Watch | None = None
    serves_all: bool = False
    is_paused: bool = False

    def add(self, region: Region) -> None:
        """Take in a region; graphs of a known signature gain its mode."""
        signature = region.signature or AnyCall()
        if region.signature is None:  # for other regions passes see to it that Python computes the same
            self.graphs_alone = next(filter(None, map(pass_of_graphs_alone, region.graphs.values())), "")
        graphs = {mode: CompiledGraph(graph) for mode, graph in region.graphs.items()}
        for entry in self.entries:
            if entry.signature == signature and entry.by_name == region.by_name and not entry.graphs.keys() & graphs:
                entry.graphs |= graphs
                return
        if not self.entries and isinstance(signature, AnyCall):
            self.only_graph, self.serves_all = graphs.get("both"), True
        self.entries.append(_Entry(signature, region.by_name, region.role, graphs))

    def look(self, owner: nn.Module) -> None:
        """Note what the graphs were made from."""
        if self.extend is not None:
            graphs = (compiled.graph for entry in self.entries for compiled in entry.graphs.values())
            self.watch = Watch.of(owner, graphs)

    def forget(self, owner: nn.Module) -> None:
        """Drop the graphs, and allow as many captures as a new table."""
        for module in owner.modules():
            adopt_pruned(module)
        self.entries, self.only_graph, self.watch = [], None, None
        self.attempts = RegionTable.attempts

    def find(self, owner: nn.Module, call: Call) -> tuple[CompiledGraph, bool] | None:
        """The graph that serves a call in the owner's mode, and whether it takes the arguments by name."""
        for entry in self.entries:
            graph = entry.graph_for(training=owner.training)
            if graph is not None and entry.signature.accepts(call):
                return graph, entry.by_name
        return None


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the graph that serves a call, or the original forward."""
    table: RegionTable = module.__dict__[_TABLE]
    original = original_forward(module)
    # torch.fx sees the code that the model was written in, not the graphs that were made from it.
    if table.is_paused or (torch.fx._symbolic_trace.is_fx_symbolic_tracing() and not is_traced()):
        return original(*args, **kwargs)
    refuse_tracers(module, *args, *kwargs.values())
    if table.watch is not None and not is_traced() and table.watch.has_changed():
        table.forget(module)
    turned_on = next((s for s in table.switches if is_turned_on(module, s)), None) if module.training else None
    if turned_on is not None:
        if table.graphs_alone:
            refuse_switch(module, turned_on, table.graphs_alone)
        clear_before_python(module)
        return original(*args, **kwargs)  # which does the checkpointing, over layers with masks of their own
    if table.only_graph is not None:
        return table.only_graph(module, *args, **kwargs)
    if not table.entries and table.extend is None:  # a model whose parts run graphs
        return original(*args, **kwargs)
    call = Call.of(module, args, kwargs)
    if call is None:
        clear_before_python(module)
        return original(*args, **kwargs)
    serving = table.find(module, call)
    if serving is None and table.extend is not None and table.attempts > 0 and not is_traced():
        table.extend(module, table, call)
        table.look(module)
        serving = table.find(module, call)
    if serving is None:
        clear_before_python(module)
        return original(*args, **kwargs)
    graph, by_name = serving
    return graph(module, **call.arguments) if by_name else graph(module, *call.tensors)


class _OfOneGraph:
    """`.graph`, `.code` and `.recompile()` of a model that one graph serves; its own of that name come first."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module | None, kind: type[nn.Module]) -> Any:
        if module is None:
            return self
        state = vars(module)
        is_own = any(self._name in state[stored] for stored in ("_modules", "_parameters", "_buffers"))
        table: RegionTable | None = state.get(_TABLE)
        if table is not None and table.serves_all:
            renew_graphs(module)
        only = table.only_graph if table is not None and not is_own else None
        if only is None:  # the module's own lookup goes on from here
            raise AttributeError(f"{kind.__name__!r} object has no attribute {self._name!r}")
        if self._name == "code":
            return only.graph.python_code("self").src
        return only.show() if self._name == "graph" else getattr(only, self._name)


_RUNNING: dict[type[nn.Module], type[nn.Module]] = {}


def _running(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that runs graphs; one per class, so that isinstance and pickle agree."""
    if kind not in _RUNNING:
        _RUNNING[kind] = _subclass(kind)
    return _RUNNING[kind]


def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    # The signature of the original forward stays visible: generation and data collators look at it.
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, args, kwargs)

    body: dict[str, Any] = {
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "forward": uncompiled(forward),
        "__reduce_ex__": _reduce,
    }
    body |= container_methods(kind)
    body |= {name: _OfOneGraph(name) for name in ("graph", "code", "recompile") if not hasattr(kind, name)}
    return type(f"Transformed{kind.__name__}", (TransformedModule, kind), body)


def _reduce(module: nn.Module, _: Any) -> Any:
    # The class is made at run time, so that pickle and copy find it through the class of the original.
    return _revive, (original_class(module),), module.__getstate__()  # type: ignore[no-untyped-call]  # object's own


def _revive(kind: type[nn.Module]) -> nn.Module:
    subclass = _running(kind)
    return subclass.__new__(subclass)


def tables_in(module: nn.Module) -> Iterator[tuple[nn.Module, RegionTable]]:
    """The modules inside a module that run graphs, with their tables."""
    for child in module.modules():
        table = child.__dict__.get(_TABLE)
        if table is not None:
            yield child, table


@contextlib.contextmanager
def paused_regions(owner: nn.Module) -> Iterator[None]:
    """A block in which the regions inside a module run their original forward, as a capture of the module sees it."""
    inside = [t for child, t in tables_in(owner) if child is not owner and t.extend is not None and not t.is_paused]
    for table in inside:
        table.is_paused = True
    try:
        yield
    finally:
        for table in inside:
            table.is_paused = False


def add_layer(layer: nn.Module, region: Region) -> None:
    """Let a layer run a graph of its own."""
    _table_of(layer, region.path, None).add(region)


def forget_graphs(model: nn.Module, layer: nn.Module) -> None:
    """Drop the graphs that were made from a layer; they are made again when they are needed."""
    for owner, table in tables_in(model):
        if table.extend is not None and any(child is layer for child in owner.modules()):
            table.forget(owner)


def renew_graphs(model: nn.Module) -> None:
    """Drop the graphs inside a model that were made from other modules than it has now, and make them again.

    What takes an example call to be captured is captured at the next call.
    """
    for module, table in list(tables_in(model)):
        if table.watch is not None and table.watch.has_changed():
            table.forget(module)
        if table.extend is not None and table.serves_all and not table.entries and not table.is_paused:
            table.extend(module, table, None)
            table.look(module)


def forget_later_hooks(model: nn.Module) -> None:
    """Remove the hooks that were registered inside of regions, for good; pruning of torch's becomes permanent."""
    for _, table in tables_in(model):
        for module in table.watch.hooked if table.watch is not None else ():
            make_plain(module)
    for module in model.modules():
        if isinstance(module, TransformedModule) and type(module).__mro__[1] is not TransformedModule:
            remove_parametrizations(module)


def _table_of(owner: nn.Module, path: str, extend: Extend | None) -> RegionTable:
    """The table of a module, which starts to run graphs if it did not before."""
    table: RegionTable | None = owner.__dict__.get(_TABLE)
    if table is not None:
        return table
    table = owner.__dict__[_TABLE] = RegionTable(path, extend=extend, switches=switches_in(owner))
    if "forward" in owner.__dict__:  # set on the instance by the user, where it would hide that of the class
        owner.__dict__[ORIGINAL_FORWARD] = owner.__dict__.pop("forward")
    owner.__class__ = _running(type(owner))
    return table


def capture_when_called(owner: nn.Module, path: str, extend: Extend | None) -> None:
    """Let a module run graphs that are captured at its first call; inside of a region where Python calls it."""
    if "forward" not in owner.__dict__:  # what the user put there would be hidden
        _table_of(owner, path, extend)
