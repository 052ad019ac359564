"""Replay rewrites: a graph that is captured later gets the masks and kernels that the model has already.

Rules
1. A masked parameter is read through its mask (rule 2 of `insert-masks`); no masks are made.
2. A layer and a BatchNorm that became an NSConv become one here too (rules 1 and 2 of `normalize-kernels`). Stored
   weights stay unchanged.

It runs after `functionalize-weights`. Nodes have the pass that is replayed as their origin.

Refused: a graph that uses the parts of an NSConv in another way, because it would compute something else than the
graphs that exist. The pass then fails as a whole, and the caller runs the Python code, which computes the same.
"""

import dataclasses
from typing import ClassVar, Final

from torch import nn

from fedmef_fx.errors import PassError
from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.nodes import layers, source_of_weight
from fedmef_fx.graph.program import Program
from fedmef_fx.ops.nsconv import Statistics, nsconv_weight
from fedmef_fx.passes._batch_norm_pairs import Pair, find_pairs
from fedmef_fx.passes._masked_reads import bare_reads, read_through_mask
from fedmef_fx.passes._nsconv_layers import normalize_pair
from fedmef_fx.records.passes import PassResult, Refusal
from fedmef_fx.sparse_model.masks import mask_name

__all__ = ["ReplayRewrites"]

_MASK: Final = "insert-masks"
_NORMALIZE: Final = "normalize-kernels"


@dataclasses.dataclass(frozen=True)
class ReplayRewrites:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        statistics: Of NSConv kernels.
        ignore: Modules that are left alone, as in `Config.ignore`.
    """

    name: ClassVar[str] = "replay-rewrites"
    statistics: Statistics = "active"
    ignore: tuple[str | type, ...] = ()

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph.

        Raises:
            PassError: A graph uses the parts of an NSConv otherwise than together.
        """
        pairs = self._match(program)
        if isinstance(pairs, Refusal):
            raise PassError(f"{pairs.where} {pairs.reason}")
        return PassResult(self.name, self._rewrite(program, pairs))

    def _match(self, program: Program) -> list[Pair] | Refusal:
        """The pairs for rule 2, or a weight that is used otherwise than where it is normalised."""
        normalized = _normalized(program.model)
        pairs = find_pairs(program, ignore=self.ignore)[0] if normalized else []
        together = {pair.layer for pair in pairs}
        for region, _, graph in program.graphs():
            for layer in layers(graph):
                target = source_of_weight(region, layer.args[1])
                has_kernel = layer in together or getattr(layer.args[1], "target", None) is nsconv_weight
                if target is not None and has_kernel != (id(region.attribute(target)) in normalized):
                    return Refusal(region.full_name(target), "is normalised in other graphs of the model only")
        return pairs

    def _rewrite(self, program: Program, pairs: list[Pair]) -> tuple[str, ...]:
        """Apply rule 1, then rule 2 to the pairs; returns the names of what changed."""
        names = _masked_parameters(program.model)
        rewrites: dict[str, None] = {}
        for region, _, graph in program.graphs():
            for read in bare_reads(region, graph, names, program.model):
                read_through_mask(read, by=_MASK)
                rewrites[read.name] = None
        gains: dict[str, float] = {}
        for pair in pairs:
            normalize_pair(pair, statistics=self.statistics, gains=gains, by=_NORMALIZE)
            rewrites[pair.name] = None
        return tuple(rewrites)


def _masked_parameters(model: nn.Module) -> dict[int, str]:
    """Identity of each masked parameter -> its name."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and mask_name(leaf) in module._buffers:
                found.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
    return found


def _normalized(model: nn.Module) -> set[int]:
    """Identities of the weights whose layers have a graph of their own with an NSConv kernel."""
    found = set()
    for module, table in tables_in(model):
        for entry in table.entries:
            for compiled in entry.graphs.values() if entry.role == "fallback" else ():
                for node in compiled.graph.find_nodes(op="call_function", target=nsconv_weight):
                    found.add(id(module.get_parameter(str(node.args[0].target))))
    return found
