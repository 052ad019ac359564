"""Replay rewrites: a graph that is captured later gets the masks and kernels that the model has already.

Rules
1. A masked parameter is read through its mask (rule 2 of `insert-masks`); no masks are made.
2. A layer and a BatchNorm that became an NSConv become one here too (rules 1 and 2 of `normalize-kernels`). Stored
   weights stay unchanged.
3. A layer with an NSConv kernel whose BatchNorm is not the next to read its result, because another module took its
   place or a hook looks in between, gets its kernel with a gain of 1 (rule 3 of `normalize-kernels`). The BatchNorm
   scales and shifts where it is called.
4. A call of `batch_norm` with the parameters of a BatchNorm that only scales and shifts -> `channel_affine`, wherever
   rule 2 does not take it: it stands in the Python code of a subclass of BatchNorm that was traced in place.

It runs after `functionalize-weights`. Nodes have the pass that is replayed as their origin.

Left alone: a layer that is new before a BatchNorm that only scales and shifts, which does that where it is called.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar, Final

from torch import nn

from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.nodes import layers, source_of_weight
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Program
from fedmef_fx.ops.nsconv import Statistics, channel_affine, nsconv_weight
from fedmef_fx.ops.scale_and_shift import ScaleAndShift
from fedmef_fx.passes._batch_norm_pairs import Pair, batch_norms, find_pairs, only_affine
from fedmef_fx.passes._masked_reads import bare_reads, read_through_mask
from fedmef_fx.passes._nsconv_layers import normalize_layer, normalize_pair, stored_kernels
from fedmef_fx.records.passes import PassResult
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
        """Apply the rules to every graph."""
        kernels, affine = _normalized(program.model)
        pairs = self._match(program, kernels, affine)
        return PassResult(self.name, self._rewrite(program, pairs, kernels, affine))

    def _match(self, program: Program, kernels: Collection[int], affine: Collection[int]) -> list[Pair]:
        """The pairs for rule 2."""
        pairs = find_pairs(program, ignore=self.ignore)[0] if affine else []
        return [pair for pair in pairs if pair.parts[0] in kernels and pair.parts[1] in affine]

    def _rewrite(
        self, program: Program, pairs: list[Pair], kernels: dict[int, dict[str, Any]], affine: Collection[int]
    ) -> tuple[str, ...]:
        """Apply rule 1, then rule 2 to the pairs, then rules 3 and 4; returns the names of what changed."""
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
        for region, _, graph in program.graphs():
            for layer in layers(graph):
                target = source_of_weight(region, layer.args[1])
                has_kernel = getattr(layer.args[1], "target", None) is nsconv_weight
                options = None if target is None or has_kernel else kernels.get(id(region.attribute(target)))
                if target is not None and options is not None:
                    normalize_layer(region, layer, target, options, by=_NORMALIZE)
                    rewrites[region.full_name(target)] = None
            for norm, path in list(batch_norms(region, graph)):
                is_inlined = norm.op == "call_function" and norm.target is not channel_affine
                if is_inlined and id(region.owner.get_submodule(path)) in affine:
                    set_provenance(only_affine(norm), by=_NORMALIZE, origin=region.full_name(path))
                    rewrites[region.full_name(path)] = None
        return tuple(rewrites)


def _masked_parameters(model: nn.Module) -> dict[int, str]:
    """Identity of each masked parameter -> its name."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and mask_name(leaf) in module._buffers:
                found.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
    return found


def _normalized(model: nn.Module) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Options of the kernels of layers by identity of the weight, and identities of the BatchNorms that only scale."""
    kernels: dict[int, dict[str, Any]] = {}
    affine = {id(module) for module in model.modules() if isinstance(module, ScaleAndShift)}
    for module, table in tables_in(model):
        for entry in table.entries:
            for compiled in entry.graphs.values() if entry.role != "region" else ():
                for kernel in stored_kernels(compiled.graph):
                    kernels[id(getattr(module, str(kernel.weight.target)))] = kernel.options
                if compiled.graph.find_nodes(op="call_function", target=channel_affine):
                    affine.add(id(module))
    return kernels, affine
