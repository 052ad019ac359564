"""Emit: from a program back to a module that runs its graphs.

One graph for the whole model becomes a `torch.fx.GraphModule` over the copy's own module tree, so that containers,
unused layers and names stay. Graphs that differ by mode are compiled and run by the module itself: its class becomes
a subclass whose forward picks the graph of the current mode. Names, `isinstance`, hooks and `deepcopy` keep working.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from fedmef_fx.model import HOLDER, transformation_of
from fedmef_fx.program import GraphMode, Program, Region

__all__ = ["CompiledGraph", "emit", "program_of"]

_GRAPHS = "_fedmef_graphs"


class CompiledGraph:
    """A graph with the function that runs it on a module; copies copy the graph and compile anew.

    Attributes:
        graph: The graph; call `recompile` after changing it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.recompile()

    def recompile(self) -> None:
        """Make the function from the graph again."""
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, "<fedmef_fx graph>", "exec"), namespace)  # noqa: S102 -- how torch.fx runs graphs
        self._forward: Callable[..., Any] = namespace["forward"]

    def __call__(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, resolving its targets against a module."""
        return self._forward(owner, *args, **kwargs)

    def __reduce__(self) -> tuple[type["CompiledGraph"], tuple[fx.Graph]]:
        return CompiledGraph, (self.graph,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledGraph":
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, values))
        for old, new in values.items():
            new.meta = copy.copy(old.meta)
        return CompiledGraph(graph)


class TransformedModule(nn.Module):
    """Mixin of modules that run traced graphs, one per mode."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode."""
        graphs: dict[GraphMode, CompiledGraph] = self.__dict__[_GRAPHS]
        return graphs["train" if self.training else "eval"](self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that pickle and copy find it through the class of the original.
        original = type(self).__mro__[2]
        return _revive, (original,), self.__getstate__()  # type: ignore[no-untyped-call]  # object's own


def _revive(kind: type[nn.Module]) -> nn.Module:
    subclass = _running(kind)
    return subclass.__new__(subclass)


_RUNNING: dict[type[nn.Module], type[nn.Module]] = {}


def _running(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that runs graphs; one per class, so that isinstance and pickle agree."""
    return _RUNNING.setdefault(kind, _subclass(kind))


def _subclass(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Transformed{kind.__name__}", (TransformedModule, kind), {"__module__": kind.__module__})


def emit(program: Program) -> nn.Module:
    """Make a program runnable.

    Returns:
        A GraphModule where one graph runs the whole model in both modes, otherwise the model with its class changed.
    """
    program.model.add_module(HOLDER, program.facts)
    (region,) = program.regions
    if "both" in region.graphs:
        return _graph_module(program.model, region.graphs["both"])
    region.owner.__dict__[_GRAPHS] = {mode: CompiledGraph(graph) for mode, graph in region.graphs.items()}
    region.owner.__class__ = _running(type(region.owner))
    return program.model


def _graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    module = fx.GraphModule(model, graph, class_name=f"Transformed{type(model).__name__}")
    # GraphModule rebuilds the tree from what the graph refers to; the model's own tree has everything.
    module._modules = model._modules
    module._parameters = model._parameters
    module._buffers = model._buffers
    module._non_persistent_buffers_set = model._non_persistent_buffers_set
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
    regions = [
        Region(path, module, {mode: compiled.graph for mode, compiled in module.__dict__[_GRAPHS].items()})
        for path, module in model.named_modules()
        if _GRAPHS in module.__dict__
    ]
    return Program(model, regions, facts)
