"""What runs: a graph with its function, and modules whose class was changed so that they run graphs."""

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from torch import fx, nn
from torch.nn.utils import parametrize

from fedmef_fx.module_tree import copy_computed_tensors

__all__ = ["CompiledGraph", "TransformedModule", "original_class", "original_forward"]

ORIGINAL_FORWARD: Final = "_fedmef_forward"
"""Where a transformed module keeps the forward that the user had set on the instance."""


class CompiledGraph:
    """A graph with the function that runs it on a module; copies copy the graph and compile it again.

    Attributes:
        graph: The graph; call `recompile` after changing it.
    """

    def __init__(self, graph: fx.Graph, is_edited: bool = False) -> None:
        self.graph = graph
        self._forward: Callable[..., Any] | None = None
        self._is_edited = is_edited
        self._shown = ""

    def show(self) -> fx.Graph:
        """The graph for a user, who may change it by hand."""
        self._shown = self._shown or str(self.graph)
        return self.graph

    @property
    def is_edited(self) -> bool:
        """Whether a user changed the graph that `show` gave."""
        self._is_edited |= bool(self._shown) and str(self.graph) != self._shown
        return self._is_edited

    def take(self) -> None:
        """Run the graph as a pass left it; that is no edit by hand. Ask for `is_edited` before the pass."""
        self._shown = self._shown and str(self.graph)
        self.recompile()

    def recompile(self) -> None:
        """Make the function from the graph again, at the next call."""
        self._forward = None

    def _compiled(self) -> Callable[..., Any]:
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, "<fedmef_fx graph>", "exec"), namespace)  # noqa: S102 -- how torch.fx runs graphs
        forward: Callable[..., Any] = namespace["forward"]
        self._forward = forward
        return forward

    def __call__(self, owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, resolving its targets against a module."""
        return (self._forward or self._compiled())(owner, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., "CompiledGraph"], tuple[fx.Graph, bool]]:
        # A graph still lists the nodes that passes have erased, by their names.
        listed = [node for node in self.graph._graph_namespace._obj_to_name if isinstance(node, fx.Node)]
        if not any(_is_local(node) for node in (*self.graph.nodes, *listed)):
            return CompiledGraph, (self.graph, self.is_edited)
        graph = copy.deepcopy(self).graph
        for node in graph.nodes:
            if _is_local(node):
                node.target = _Reference(node.target.__module__, node.target.__name__)
        # Another copy: the first one still lists the old targets.
        return _restored, (copy.deepcopy(CompiledGraph(graph)).graph, self.is_edited)

    def __deepcopy__(self, _: dict[int, Any]) -> "CompiledGraph":
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(self.graph, values))
        for old, new in values.items():
            new.meta = copy.copy(old.meta)
        return CompiledGraph(graph, self.is_edited)


def _is_local(node: fx.Node) -> bool:
    """Whether a node calls a function of torch, such as F.max_pool2d, that says it is local: no pickle finds it."""
    return "<locals>" in getattr(node.target, "__qualname__", "")


class _Reference(NamedTuple):
    """A function by the module and the name under which it is found."""

    module: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.function(*args, **kwargs)

    @property
    def function(self) -> Callable[..., Any]:
        """The function."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return function


def _restored(graph: fx.Graph, is_edited: bool = False) -> CompiledGraph:
    for node in graph.nodes:
        if isinstance(node.target, _Reference):
            node.target = node.target.function
    return CompiledGraph(graph, is_edited)


class TransformedModule(nn.Module):
    """Mixin of modules that run traced graphs, one per mode and kind of call, or their original forward."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy, also where a layer computes its weight before each call, which `deepcopy` alone refuses."""
        copy_computed_tensors(self, memo)
        own = getattr(super(), "__deepcopy__", None)
        if own is not None:
            copied: nn.Module = own(memo)
            return copied
        if parametrize.is_parametrized(self):  # a class that torch made for this module, which refuses to be reduced
            replica = memo[id(self)] = type(self).__new__(type(self))
            vars(replica).update(copy.deepcopy(vars(self), memo))
            return replica
        parts: Any = self.__reduce_ex__(4)  # three, as dispatch gives them
        make, arguments, state = parts
        duplicate = memo[id(self)] = make(*arguments)
        duplicate.__setstate__(copy.deepcopy(state, memo))
        result: nn.Module = duplicate
        return result


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, for a transformed module that which it was made from."""
    bases = type(module).__mro__
    return bases[bases.index(TransformedModule) + 1] if TransformedModule in bases else type(module)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module, for a transformed module the one that runs no graph."""
    if not isinstance(module, TransformedModule):
        return module.forward
    stored: Callable[..., Any] | None = vars(module).get(ORIGINAL_FORWARD)
    return stored or functools.partial(original_class(module).forward, module)
