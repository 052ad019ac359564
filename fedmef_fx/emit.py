"""Emit: from a program back to a module that runs its graphs.

One graph for the whole model and all calls becomes a `torch.fx.GraphModule` over the copy's own module tree, so that
containers, unused layers and names stay. Everything else stays the model it was: the class of each region's owner
becomes a subclass whose forward picks the graph for the mode and the kind of call, and runs the original forward where
there is none. Names, `isinstance`, hooks, `deepcopy` and pickling keep working.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx, nn

from fedmef_fx.compiled import CompiledGraph
from fedmef_fx.gradient_masks import keep_gradients_masked
from fedmef_fx.model import HOLDER, transformation_of
from fedmef_fx.program import GraphMode, Program, Region, Role
from fedmef_fx.signature import AnyCall, AnyTensors, Call, Signature

__all__ = ["CompiledGraph", "RegionTable", "TransformedModule", "emit", "program_of", "restore_classes"]

_TABLE: Final = "_fedmef_regions"
_FORWARD: Final = "_fedmef_forward"
_KEPT_BY_ROOT: Final = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

Extend = Callable[[nn.Module, "RegionTable", Call], None]


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
        extend: Captures another kind of call when it is first made, and adds it here; None for layers.
        attempts: How many more kinds of call may be tried.
    """

    path: str
    entries: list[_Entry] = dataclasses.field(default_factory=list)
    extend: Extend | None = None
    attempts: int = 4

    def add(self, region: Region) -> None:
        """Take in a region; graphs of a known signature gain its mode."""
        signature = region.signature or AnyCall()
        graphs = {mode: CompiledGraph(graph) for mode, graph in region.graphs.items()}
        for entry in self.entries:
            if entry.signature == signature and entry.by_name == region.by_name and not entry.graphs.keys() & graphs:
                entry.graphs |= graphs
                return
        self.entries.append(_Entry(signature, region.by_name, region.role, graphs))

    def find(self, owner: nn.Module, call: Call) -> tuple[CompiledGraph, bool] | None:
        """The graph that serves a call in the owner's mode, and whether it takes the arguments by name."""
        for entry in self.entries:
            graph = entry.graph_for(training=owner.training)
            if graph is not None and entry.signature.accepts(call):
                return graph, entry.by_name
        return None


class TransformedModule(nn.Module):
    """Mixin of modules that run traced graphs, one per mode and kind of call, or their original forward."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: copies and pickles name the class that it is made from.
        return _rebuild, (type(self).__mro__[2],), dict(self.__dict__)


def _run(module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the graph that serves a call, or the original forward."""
    table: RegionTable = module.__dict__[_TABLE]
    call = Call.of(module, args, kwargs)
    if call is None:
        return original(*args, **kwargs)
    found = table.find(module, call)
    if found is None and table.extend is not None and table.attempts > 0 and _may_capture():
        table.extend(module, table, call)
        found = table.find(module, call)
    if found is None:
        return original(*args, **kwargs)
    graph, by_name = found
    return graph(module, **call.arguments) if by_name else graph(module, *call.tensors)


def _may_capture() -> bool:
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.maybe_current_level())  # type: ignore[attr-defined]


@functools.cache
def _running(kind: type[nn.Module]) -> type[nn.Module]:
    # The signature of the original forward stays visible: generation and data collators look at it.
    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = self.__dict__.get(_FORWARD) or functools.partial(kind.forward, self)
        return _run(self, original, args, kwargs)

    body = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward}
    return type(f"Transformed{kind.__name__}", (TransformedModule, kind), body)


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    made = _running(kind)
    return made.__new__(made)


def emit(program: Program, *, extend: Extend | None = None) -> nn.Module:
    """Make a program runnable.

    Args:
        program: The program.
        extend: Captures kinds of calls that come up later; see `RegionTable`.

    Returns:
        A GraphModule where one graph runs the whole model in both modes, otherwise the model with classes changed.
    """
    program.model.add_module(HOLDER, program.facts)
    if program.is_one_graph:
        result: nn.Module = _graph_module(program.model, program.regions[0].graphs["both"])
    else:
        result = program.model
        for region in program.regions:
            table = region.owner.__dict__.get(_TABLE)
            if table is None:
                table = RegionTable(region.path, extend=extend if region.role == "region" else None)
                _swap(region.owner, table)
            table.add(region)
    keep_gradients_masked(result)
    return result


def _swap(owner: nn.Module, table: RegionTable) -> None:
    owner.__dict__[_TABLE] = table
    if "forward" in owner.__dict__:  # set on the instance by the user, where it would hide that of the class
        owner.__dict__[_FORWARD] = owner.__dict__.pop("forward")
    owner.__class__ = _running(type(owner))


def _graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    module = fx.GraphModule(model, graph, class_name=f"Transformed{type(model).__name__}")
    # GraphModule rebuilds the tree from what the graph refers to; the model's own tree has everything.
    module._modules = model._modules
    module._parameters = model._parameters
    module._buffers = model._buffers
    module._non_persistent_buffers_set = model._non_persistent_buffers_set
    for name in _KEPT_BY_ROOT:
        getattr(module, name).update(getattr(model, name))
    for name, value in vars(model).items():
        if name not in vars(module) and name != "forward" and not hasattr(type(module), name):
            vars(module)[name] = value
    module.train(model.training)
    return module


def program_of(model: nn.Module) -> Program:
    """The program that a transformed model runs; its graphs are the model's own, not copies.

    Raises:
        ConfigError: Not a transformed model.
    """
    facts = transformation_of(model)
    if isinstance(model, fx.GraphModule):
        return Program(model, [Region("", model, {"both": model.graph})], facts)
    regions = []
    for path, module in model.named_modules():
        table: RegionTable | None = module.__dict__.get(_TABLE)
        for entry in table.entries if table is not None else ():
            graphs = {mode: compiled.graph for mode, compiled in entry.graphs.items()}
            signature = None if isinstance(entry.signature, AnyCall) else entry.signature
            regions.append(Region(path, module, graphs, signature, entry.by_name, entry.role))
    return Program(model, regions, facts)


def restore_classes(model: nn.Module) -> None:
    """Let the modules of a transformed model run their original forward again, in place."""
    for module in model.modules():
        if module.__dict__.pop(_TABLE, None) is not None:
            module.__class__ = type(module).__mro__[2]
            if _FORWARD in module.__dict__:
                module.__dict__["forward"] = module.__dict__.pop(_FORWARD)
