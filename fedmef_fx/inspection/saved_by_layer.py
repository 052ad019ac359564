"""What each layer keeps for backward, so that every byte counts once and the layers add up to the model.

1. Memory that a layer keeps counts for the weight of that layer; if several layers keep it, for the first.
2. A packed activation, which is no tensor of the graph, counts for the first layer that reads it.
3. What is computed from a weight alone (masked or normalised kernels) counts for that weight.
4. Of opaque modules (nn.LSTM, ...) everything counts for their first prunable weight.
5. Everything else (activation functions, normalisation, pooling, Python between the graphs) is the rest.
"""

from collections import defaultdict
from collections.abc import Collection

from torch import fx

from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.recording import Observation
from fedmef_fx.inspection.costs import parameter_behind, weights_of

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
    total.rest = sum(storage.nbytes for storage in observation.kept_outside)
    payers: dict[int, int] = {}
    nbytes: dict[int, int] = {}
    for region, _, graph in program.graphs():
        for node in graph.nodes if graph in observation.measured else ():
            kept = observation.kept.get(node, ())
            weight = _payer(region, node, observation, prunable) if kept else None
            for storage in kept:
                nbytes[storage.number] = storage.nbytes
                if weight is not None:
                    payers.setdefault(storage.number, weight)
    outside = {storage.number for storage in observation.kept_outside}
    for number, size in nbytes.items():
        if number in payers:
            total.of[payers[number]] += size
            total.rest -= size if number in outside else 0
        elif number not in outside:
            total.rest += size
    return total


def _payer(region: Region, node: fx.Node, observation: Observation, prunable: Collection[int]) -> int | None:
    """Identity of the weight that pays for what a node keeps."""
    # What a node without a tensor for a value keeps, it keeps for its readers.
    readers = () if observation.tensors.get(node) else tuple(node.users)
    weights = (_weight(region, candidate, observation, prunable) for candidate in (node, *readers))
    return next((weight for weight in weights if weight is not None), None)


def _weight(region: Region, node: fx.Node, observation: Observation, prunable: Collection[int]) -> int | None:
    """Identity of the weight that a node works with."""
    if node.op in ("placeholder", "output", "get_attr"):
        return None
    candidates = weights_of(region, node, observation.tensors)
    module = region.module(node)
    if not candidates and module is not None:
        candidates = list(module.parameters())
    if not candidates and (behind := parameter_behind(region, node)) is not None:
        candidates = [behind]
    return next((id(weight) for weight in candidates if id(weight) in prunable), None)
