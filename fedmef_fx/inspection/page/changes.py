"""Which passes changed a node: read from provenance and from what the passes say they rewrote."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from fedmef_fx.records.graphs import GraphRecord, NodeRecord
from fedmef_fx.records.passes import PassReport

__all__ = ["Changes"]


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """The passes by what they changed.

    Attributes:
        order: Pass -> its place in the report.
        rewritten: Name of a node, module or parameter -> places of the passes that list it as rewritten.
        made: Region and name of a node or layer -> places of the passes that made something from it or for it.
    """

    order: Mapping[str, int]
    rewritten: Mapping[str, frozenset[int]]
    made: Mapping[tuple[str, str], frozenset[int]]

    @classmethod
    def between(
        cls,
        before: Iterable[GraphRecord],
        after: Iterable[GraphRecord],
        passes: PassReport,
        parameters: Collection[str],
    ) -> "Changes":
        """The changes that led from one version of a model to another.

        Args:
            before: Graphs of the original.
            after: Graphs of the model.
            passes: What ran in between.
            parameters: Names of the prunable parameters; what was done to one was done to its layer.
        """
        order = {result.name.partition("{")[0]: index for index, result in enumerate(passes)}
        rewritten: dict[str, set[int]] = {}
        for index, result in enumerate(passes):
            for name in result.rewrites if result.name != "capture" else ():
                rewritten.setdefault(name, set()).add(index)
                if name in parameters:
                    rewritten.setdefault(name.rpartition(".")[0], set()).add(index)
        layers = {(graph.region, node.target) for graph in before for node in graph.nodes if node.op == "call_module"}
        changes: dict[tuple[str, str], set[int]] = {}
        for graph in after:
            for node in graph.nodes:
                if node.made_by is None or node.made_by not in order:
                    continue
                sources = {(graph.region, node.name), (graph.region, node.origin or "")}
                sources |= {(graph.region, node.module)} & layers
                for source in sources:
                    changes.setdefault(source, set()).add(order[node.made_by])
        return cls(order, _frozen(rewritten), {key: frozenset(value) for key, value in changes.items()})

    def passes(self, when: str, graph: GraphRecord, node: NodeRecord) -> Sequence[int]:
        """Places in the report of the passes that changed a node, in order.

        Args:
            when: "before" or "after": the version that the graph belongs to.
            graph: Its graph.
            node: The node.
        """
        if node.op in ("placeholder", "output"):
            return ()
        names = {node.name, node.target} if node.op in ("get_attr", "call_module") else {node.name}
        places = {index for name in names for index in self.rewritten.get(name, ())}
        if when == "before":
            places |= {index for name in names for index in self.made.get((graph.region, name), ())}
        elif node.made_by is not None and node.made_by in self.order:
            origins = (node.origin or "", node.module)
            places |= {self.order[node.made_by], *(index for name in origins for index in self.rewritten.get(name, ()))}
        return sorted(places)


def _frozen(sets: Mapping[str, set[int]]) -> dict[str, frozenset[int]]:
    return {key: frozenset(value) for key, value in sets.items()}
