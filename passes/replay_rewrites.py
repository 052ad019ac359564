"""Replay rewrites: a graph that is captured later gets the masks and kernels that the model has already.

Rules
1. Layers become functional (`FunctionalizeWeights`).
2. A masked parameter is read through its mask (rule 2 of `InsertMasks`); no masks are made.
3. A layer and a BatchNorm that became an NSConv become one here too (`NormalizeKernels`).

The pass fails where a graph uses the parts of an NSConv in another way, because it would compute something else than
the graphs that exist; the caller then runs the Python code, which computes the same.
"""

import dataclasses
from typing import ClassVar

from torch import nn

from fedmef_fx.errors import PassError
from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.nodes import layers, source_of_weight
from fedmef_fx.graph.program import Program
from fedmef_fx.ops.nsconv import Statistics, nsconv_weight
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import read_through_masks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.records.passes import PassResult
from fedmef_fx.sparse_model.masks import mask_name

__all__ = ["ReplayRewrites"]


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
        rewrites = list(FunctionalizeWeights(self.ignore).run(program).rewrites)
        masked = _masked_parameters(program.model)
        for region, _, graph in program.graphs():
            read_through_masks(region, graph, masked, program.model)
        regions = list(program.regions)
        normalized = _normalized(program.model)
        if normalized:
            rewrites += NormalizeKernels(self.statistics, self.ignore).run(program).rewrites
            program.regions = regions  # the layers' own graphs exist
        for region, _, graph in program.graphs():
            for layer in layers(graph):
                target = source_of_weight(region, layer.args[1])
                kernel = getattr(layer.args[1], "target", None) is nsconv_weight
                if target is not None and kernel != (id(region.attribute(target)) in normalized):
                    raise PassError(f"{region.full_name(target)} is normalised in other graphs of the model only")
        return PassResult(self.name, tuple(rewrites) or tuple(masked.values()))


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
