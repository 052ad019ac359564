"""What each layer keeps for backward, so that every byte counts once and the layers add up to the model.

1. Memory that a layer keeps counts for the weight of that layer; if several layers keep it, for the first.
2. A packed activation, which is no tensor of the graph, counts for the first layer that reads it.
3. What is computed from a weight alone (masked or normalised kernels) counts for that weight.
4. Of opaque modules (nn.LSTM, ...) everything counts for their first prunable weight.
5. Everything else (activation functions, normalisation, pooling) is the rest.
"""

from collections import defaultdict
from collections.abc import Collection

from torch import fx

from fedmef_fx.inspection.costs import parameter_behind, weights_of
from fedmef_fx.inspection.shapes import Observation
from fedmef_fx.program import Program, Region

__all__ = ["SavedByLayer", "saved_by_layer"]


class SavedByLayer:
    """Bytes kept for backward.

    Attributes:
        of: By identity of the weight.
        rest: What counts for no weight.
    """

    def __init__(self) -> None:
        self.of: dict[int, int] = defaultdict(int)
        self.rest = 0


def saved_by_layer(program: Program, observation: Observation, prunable: Collection[int]) -> SavedByLayer | None:
    """Bytes by weight.

    Args:
        program: The program.
        observation: What example inputs showed.
        prunable: Identities of the weights that may be charged.

    Returns:
        The bytes; None where nothing was measured, or not all that runs in train mode.
    """
    if not observation.measured or observation.notices:
        return None
    total = SavedByLayer()
    for region, _, graph in program.graphs():
        if graph in observation.measured:
            _add(total, region, graph, observation, prunable)
    return total


def _add(
    total: SavedByLayer, region: Region, graph: fx.Graph, observation: Observation, prunable: Collection[int]
) -> None:
    keepers: dict[int, list[fx.Node]] = defaultdict(list)
    nbytes = {}
    for node in graph.nodes:
        for storage in observation.kept.get(node, ()):
            keepers[storage.number].append(node)
            nbytes[storage.number] = storage.nbytes
    weights = {node: _weight(region, node, observation, prunable) for node in graph.nodes}
    for number, nodes in keepers.items():
        readers = [user for node in nodes if not observation.tensors.get(node) for user in node.users]
        charged = next((weights[node] for node in (*nodes, *readers) if weights[node] is not None), None)
        if charged is None:
            total.rest += nbytes[number]
        else:
            total.of[charged] += nbytes[number]


def _weight(region: Region, node: fx.Node, observation: Observation, prunable: Collection[int]) -> int | None:
    """Identity of the weight that pays for what a node keeps."""
    if node.op in ("placeholder", "output", "get_attr"):
        return None
    candidates = weights_of(region, node, observation.tensors)
    module = region.module(node)
    if not candidates and module is not None:
        candidates = list(module.parameters())
    if not candidates and (behind := parameter_behind(region, node)) is not None:
        candidates = [behind]
    return next((id(weight) for weight in candidates if id(weight) in prunable), None)
