"""A graph with the function that runs it."""

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

__all__ = ["CompiledGraph"]


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

    def __getstate__(self) -> dict[str, Any]:
        return {"graph": self.graph}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["graph"])  # type: ignore[misc]  # compiles anew

    def __deepcopy__(self, memo: dict[int, Any]) -> "CompiledGraph":
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, values := {}))
        for old, new in values.items():
            new.meta = copy.copy(old.meta)
        return CompiledGraph(graph)
