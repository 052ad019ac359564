"""Compress saved: what must not be pruned is kept in 8, 4 or 2 bits per element.

Rules
1. GELU, SiLU, Hardswish, Hardsigmoid, Mish, Softplus, squares, cubes -> `compressed_activation`: the input in few bits.
2. Sigmoid, tanh, softmax and log-softmax -> `compressed_result`: the result in few bits.
3. LayerNorm, GroupNorm, RMSNorm, InstanceNorm -> `compressed_norm`, BatchNorm -> `compressed_batch_norm`: the input in
   few bits, no statistics.
4. Products of two activations -> `compressed_mul`, `compressed_matmul`: each operand in few bits.
5. `F.scaled_dot_product_attention` -> `compressed_attention`: query, key and value in few bits; backward runs it again.
6. A tensor is encoded once, right after it is made, by one `KeepActivation` site for all that read it. It gets none
   where it is kept anyway: as the result of rule 2, or as a cheap function of what is kept (rule 1, LayerNorm,
   GroupNorm), which is computed again. `prune-activations` gives layers the same handles.

It runs before `shrink-saved` and `prune-activations`, so that they see which tensors no longer stay dense; what only
ReLU-likes, pooling and layers read is left to them.

Refused: a tensor that stays dense anyway because something else keeps it, options that are computed at run time,
modules with hooks, in-place activations on a tensor with other users, InstanceNorm with running statistics. What would
take no fewer bytes than the tensor is decided when its size is known, in each step: the site's `reason` says so.
"""

import dataclasses
import operator
from collections.abc import Collection
from typing import Any, ClassVar, Literal

from torch import fx
from torch.fx.node import Argument

from fedmef_fx.config import SAVED_BITS
from fedmef_fx.graph.gradients import differentiable
from fedmef_fx.graph.nodes import without_views
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.saves import kept_tensors
from fedmef_fx.passes._compressible import Compression, compression_of
from fedmef_fx.passes._handles import add_keeping_site, add_noise_site, handle_of
from fedmef_fx.passes._pruned_layers import prunable_layers
from fedmef_fx.passes._shrinkable import shrinkable
from fedmef_fx.records.graphs import GraphMode
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["CompressSaved"]


@dataclasses.dataclass(frozen=True)
class CompressSaved:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        ignore: Modules whose layers `prune-activations` leaves alone, as in `Config.ignore`.
        saved_precision: Bits per element, as in `Config.saved_precision`.
    """

    name: ClassVar[str] = "compress-saved"
    ignore: tuple[str | type, ...] = ()
    saved_precision: Literal["int8", "int4", "int2"] = "int8"

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for region, mode, graph in program.graphs():
            if region.role != "fallback":
                done, refused = self._run(region, mode, graph)
                rewrites += done
                refusals += refused
        return PassResult(self.name, tuple(rewrites), tuple(dict.fromkeys(refusals)))

    def _run(self, region: Region, mode: GraphMode, graph: fx.Graph) -> tuple[list[str], list[Refusal]]:
        carriers = set(differentiable(region, graph))
        matches = {node: self._match(region, node, carriers) for node in graph.nodes}
        refusals = [match for match in matches.values() if isinstance(match, Refusal)]
        chosen = [node for node, match in matches.items() if isinstance(match, Compression)]
        others = {*shrinkable(region, graph), *prunable_layers(region, graph, ignore=self.ignore)}
        kept = kept_tensors(region, graph, rewritten={*chosen, *others})
        rewrites: list[str] = []
        for node in chosen:
            # Again: the nodes that it reads may have been replaced.
            compression = self._match(region, node, carriers)
            if not isinstance(compression, Compression):
                continue
            tensors = self._match_tensors(region, node, compression, kept)
            dense = [tensor for tensor in tensors if isinstance(tensor, Refusal)]
            refusals += dense
            operands = tuple(None if isinstance(tensor, Refusal) else tensor for tensor in tensors)
            if not any(operands) and not (compression.keeps_result and not dense):
                continue
            rewrites.append(region.full_name(node.name))
            new = self._rewrite(region, mode, node, compression, operands)
            carriers.add(new)
            if node in kept:
                kept[new] = kept[node]
        return rewrites, refusals

    def _match(self, region: Region, node: fx.Node, carriers: Collection[fx.Node]) -> Compression | Refusal | None:
        """What takes a node's place, why nothing does, or None for a node that keeps nothing."""
        found = compression_of(region, node, carriers)
        return Refusal(region.full_name(node.name), found) if isinstance(found, str) else found

    def _match_tensors(
        self, region: Region, node: fx.Node, compression: Compression, kept: dict[fx.Node, str]
    ) -> list[fx.Node | Refusal | None]:
        """Which of the tensors that backward needs are kept in few bits; why others stay dense; None for a weight.

        There is one for each operand; where the result is kept instead, it is here only if it stays dense.
        """
        if compression.keeps_result:
            return [Refusal(region.full_name(node.name), f"stays dense: {kept[node]}")] if node in kept else []
        found: list[fx.Node | Refusal | None] = []
        for x in compression.operands:
            root = without_views(region, x)
            if not isinstance(x, fx.Node) or not isinstance(root, fx.Node) or (root in kept and root.op == "get_attr"):
                found.append(None)
            elif root in kept:
                found.append(Refusal(region.full_name(x.name), f"stays dense: {kept[root]}"))
            else:
                found.append(x)
        return found

    def _rewrite(
        self,
        region: Region,
        mode: GraphMode,
        node: fx.Node,
        compression: Compression,
        operands: tuple[fx.Node | None, ...],
    ) -> fx.Node:
        """Put the compression in the node's place; each operand but None gets a handle, if it has none yet."""
        graph, bits = node.graph, SAVED_BITS[self.saved_precision]
        handles: tuple[fx.Node | None, ...] = ()
        if not compression.keeps_result:
            handles = tuple(None if x is None else self._handle(region, mode, x) for x in operands)
        made: list[fx.Node] = []

        def read(target: str) -> fx.Node:
            made.append(graph.get_attr(target))
            return made[-1]

        with graph.inserting_before(node):
            extra: list[Any] = [read(compression.module)] if compression.module is not None else []
            extra += [None if target is None else read(target) for target in compression.parameters]
            args: tuple[Argument, ...] = (*compression.call(handles), *extra)
            options = compression.options
            if compression.keeps_result and bits != 8:
                made.append(add_noise_site(region, mode, node, by=self.name))
                options = {**options, "bits": bits, "key": made[-1]}
            result = new = graph.call_function(compression.op, args, options)
            if compression.keeps_result:
                result = graph.call_function(operator.getitem, (new, 0))
        node.replace_all_uses_with(result)
        origin = str(node.target) if node.op == "call_module" else node.name
        for inserted in dict.fromkeys((*made, new, result)):
            set_provenance(inserted, by=self.name, origin=origin)
        graph.erase_node(node)
        return result

    def _handle(self, region: Region, mode: GraphMode, x: fx.Node) -> fx.Node:
        return handle_of(region, x, by=self.name) or add_keeping_site(
            region, mode, x, by=self.name, bits=SAVED_BITS[self.saved_precision]
        )
