"""Rescale residual sums, so that variance stays bounded with depth once BatchNorm is gone.

Two branches of unit variance, not correlated, add up to variance 2; BatchNorm used to undo that in the next layer.

Rules
1. `a + b`, where a or b comes straight from a layer with an NSConv kernel -> `(a + b) * (1 / sqrt(2))`.
2. Sums that no NSConv feeds are left alone: what normalises them is still there.

Refused: regions whose Python forward may run for other calls, because there the sum stays as it is; `a += b` where
something reads a afterwards, which would see the sum without the factor.
"""

import dataclasses
import math
import operator
from typing import ClassVar, Final

from torch import fx

from fedmef_fx.graph.nodes import is_addition, is_inplace, is_view, layers, without_views
from fedmef_fx.graph.origin import module_of, set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.ops.in_place import mul_over
from fedmef_fx.ops.nsconv import channel_affine, nsconv_weight
from fedmef_fx.passes._nsconv_layers import calls_normalized
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["RescaleAllResiduals", "RescaleResiduals"]

_FACTOR: Final = math.sqrt(0.5)


@dataclasses.dataclass(frozen=True)
class RescaleResiduals:
    """The pass of this module; see the module docstring for its rules."""

    name: ClassVar[str] = "rescale-residuals"
    in_all_regions: ClassVar[bool] = False
    """Whether regions whose Python forward may run are rewritten, too."""

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        rewrites: dict[str, None] = {}
        refusals: dict[str, Refusal] = {}
        for region, _, graph in program.graphs():
            normalized = {node for node in layers(graph) if _is_nsconv(node)}
            normalized |= set(graph.find_nodes(op="call_function", target=channel_affine))
            normalized |= {node for node in graph.find_nodes(op="call_module") if calls_normalized(region.module(node))}
            for node in list(graph.nodes):
                match = self._match(region, node, normalized)
                if isinstance(match, Refusal):
                    refusals[match.where] = match
                elif match is not None:
                    self._rewrite(match)
                    rewrites[region.full_name(match.name)] = None
        return PassResult(self.name, tuple(rewrites), tuple(refusals.values()))

    @staticmethod
    def modules_with_sums(program: Program) -> tuple[str, ...]:
        """Paths of the modules below the regions' owners whose forward makes sums that have the factor."""
        sums = [
            (region, node.all_input_nodes[0])
            for region, _, graph in program.graphs()
            for target in (operator.mul, mul_over)  # which memory passes put in its place
            for node in graph.find_nodes(op="call_function", target=target)
            if node.args[1] == _FACTOR
        ]
        paths = {module_of(region, node): region for region, node in sums}
        return tuple(path for path, region in paths.items() if path != region.path)

    def _match(self, region: Region, node: fx.Node, normalized: set[fx.Node]) -> fx.Node | Refusal | None:
        """The node, if it is a sum that grows; why its value may not change; None for any other node."""
        if not _is_sum_of(region, node, normalized):
            return None
        if region.may_run_python and not self.in_all_regions:
            reason = "the model's Python code may run for other calls, without the factor"
            return Refusal(region.full_name(node.name), reason)
        if _is_seen_elsewhere(region, node):
            return Refusal(region.full_name(node.name), "it is written into a tensor that others read")
        return node

    def _rewrite(self, node: fx.Node) -> None:
        with node.graph.inserting_after(node):
            scaled = node.graph.call_function(operator.mul, (node, _FACTOR))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        set_provenance(scaled, by=self.name, origin=node.name)


@dataclasses.dataclass(frozen=True)
class RescaleAllResiduals(RescaleResiduals):
    """The same in models that ran a single graph with the factor: all that is captured later needs it."""

    in_all_regions: ClassVar[bool] = True


def _is_sum_of(region: Region, node: fx.Node, normalized: set[fx.Node]) -> bool:
    """Whether a node adds up two tensors, one of them straight from an NSConv layer, and has no factor yet."""
    if not is_addition(node) or node.kwargs:
        return False
    if any(user.target is operator.mul and user.args[1] == _FACTOR for user in node.users):
        return False
    terms = [without_views(region, term) for term in node.args]
    return len(terms) == 2 and all(isinstance(term, fx.Node) for term in terms) and any(t in normalized for t in terms)


def _is_seen_elsewhere(region: Region, node: fx.Node) -> bool:
    """Whether a sum lies in the storage of a term that has other readers."""
    term = node.args[0]
    if not is_inplace(region, node) or not isinstance(term, fx.Node):
        return False
    return len(term.users) > 1 or is_view(region, term)


def _is_nsconv(node: fx.Node) -> bool:
    kernel = node.args[1]
    return isinstance(kernel, fx.Node) and kernel.target is nsconv_weight
