"""Which nodes `shrink-saved` rewrites, for passes that run before it and leave these to it."""

from torch import fx

from fedmef_fx.graph.nodes import is_inplace, owns_input
from fedmef_fx.graph.program import Region
from fedmef_fx.passes.shrink_saved import replacement_of

__all__ = ["shrinkable"]


def shrinkable(region: Region, graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a graph that are rewritten unless something else keeps their result anyway."""
    found = (n for n in graph.nodes if replacement_of(region, n) is not None)
    return {n for n in found if not is_inplace(region, n) or owns_input(region, n)}
