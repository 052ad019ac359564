"""What runs: a graph with its function, and modules whose class was changed so that they run graphs."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Final

from torch import fx, nn

__all__ = ["CompiledGraph", "TransformedModule", "original_class", "original_forward"]

ORIGINAL_FORWARD: Final = "_fedmef_forward"
"""Where a transformed module keeps the forward that the user had set on the instance."""


class CompiledGraph:
    """A graph with the function that runs it on a module; copies copy the graph and compile anew.

    Attributes:
        graph: The graph; call `recompile` after changing it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._forward: Callable[..., Any] | None = None

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
    """Mixin of modules that run traced graphs, one per mode and kind of call, or their original forward."""


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, for a transformed module that which it was made from."""
    return type(module).__mro__[2] if isinstance(module, TransformedModule) else type(module)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module, for a transformed module the one that runs no graph."""
    if not isinstance(module, TransformedModule):
        return module.forward
    stored: Callable[..., Any] | None = vars(module).get(ORIGINAL_FORWARD)
    return stored or functools.partial(original_class(module).forward, module)
