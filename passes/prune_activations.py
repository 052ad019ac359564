"""Prune activations: layers keep the largest part of their input for backward, packed once for all of them.

Rules
1. `layer(x, weight, bias)` -> `pruned_convolution` / `pruned_linear`, which make their weight (dense, masked or
   NSConv) again in backward instead of keeping it.
2. x is packed, or put in a code of few bits, right after it is made, by one `PackActivation` site that all layers
   reading x share. Where `compress-saved` keeps x already, or x is a cheap function of what it keeps, the layers take
   that instead.
3. Convolutions, sums and products with a number write over what they read, where nothing else does
   (`passes/_reused_memory.py`).

Not packed, with the reason: an x that stays dense anyway because another node keeps it (the layer then keeps that same
tensor, at no cost and with exact gradients), and inputs of the model, which its caller holds.

Refused: ignored layers; geometry that is not static; asymmetric `padding="same"`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from torch import fx

from fedmef_fx.graph.nodes import layers, without_views
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.saves import kept_tensors
from fedmef_fx.graph.sites import add_site
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.packing.bit_planes import Bits
from fedmef_fx.packing.block_code import BlockCode, Levels, Rounding
from fedmef_fx.passes._handles import add_keeping_site, handle_of, noise_seed
from fedmef_fx.passes._pruned_layers import match_layer, prune_layer
from fedmef_fx.passes._reused_memory import reuse_memory
from fedmef_fx.records.graphs import GraphMode
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["PruneActivations"]


@dataclasses.dataclass(frozen=True)
class PruneActivations:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        activation_sparsity: gamma, the share of an activation that is dropped, in [0, 1). 0 keeps all of it, in 8 bits
            or in `activation_bits`.
        threshold_sample: Elements sampled to estimate a threshold.
        threshold_interval: Training steps between estimates.
        ignore: Modules that are left alone, as in `Config.ignore`.
        packed_dtype: Type in which the kept values are stored; "same" as the activation's.
        activation_bits: Bits of the code for what is kept; None for values.
        activation_block: Elements per block of that code.
        activation_levels: What its codes stand for.
        activation_rounding: How it rounds.
        seed: Of the noise of stochastic rounding.
    """

    name: ClassVar[str] = "prune-activations"
    activation_sparsity: float = 0.9
    threshold_sample: int = 8192
    threshold_interval: int = 8
    ignore: tuple[str | type, ...] = ()
    packed_dtype: Literal["same", "bfloat16", "float16"] = "same"
    activation_bits: Bits | None = None
    activation_block: int = 256
    activation_levels: Levels = "range"
    activation_rounding: Rounding = "stochastic"
    seed: int = 0

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for region, mode, graph in program.graphs():
            if region.role == "fallback":
                continue  # serves rare calls, and takes no more memory in them than the original
            matches = {node: self._match(region, node) for node in layers(graph)}
            refusals += [match for match in matches.values() if isinstance(match, Refusal)]
            chosen = {node: match for node, match in matches.items() if not isinstance(match, Refusal)}
            kept = kept_tensors(region, graph, rewritten=set(chosen))
            packed: dict[fx.Node, fx.Node] = {}
            for node, geometry in chosen.items():
                x = self._match_input(region, node, kept)
                if isinstance(x, Refusal):
                    refusals.append(x)
                rewrites.append(region.full_name(node.name))
                self._rewrite(region, mode, node, geometry, x if isinstance(x, fx.Node) else None, packed)
            reuse_memory(region, graph, by=self.name)
        return PassResult(self.name, tuple(rewrites), tuple(dict.fromkeys(refusals)))

    def _match(self, region: Region, node: fx.Node) -> dict[str, Any] | Refusal:
        """The layer's geometry, or why it is left alone."""
        geometry = match_layer(region, node, ignore=self.ignore)
        return Refusal(region.full_name(node.name), geometry) if isinstance(geometry, str) else geometry

    def _match_input(self, region: Region, node: fx.Node, kept: dict[fx.Node, str]) -> fx.Node | Refusal | None:
        """The input of a layer, if it can be packed; why it stays dense; None for one that is no node."""
        x = node.args[0]
        root = without_views(region, x)
        if not isinstance(x, fx.Node):
            return None
        return Refusal(region.full_name(x.name), f"stays dense: {kept[root]}") if root in kept else x

    def _rewrite(
        self,
        region: Region,
        mode: GraphMode,
        node: fx.Node,
        geometry: dict[str, Any],
        x: fx.Node | None,
        packed: dict[fx.Node, fx.Node],
    ) -> None:
        """Make a pruned layer of a layer.

        Args:
            region: The region of the graph.
            mode: The mode of the graph.
            node: The layer.
            geometry: From `_match`.
            x: Its input, if that is packed.
            packed: Input -> where it is packed, which this adds to.
        """
        if x is not None and x not in packed:
            packed[x] = handle_of(region, x, by=self.name) or self._pack(region, mode, x)
        prune_layer(node, None if x is None else packed[x], geometry, by=self.name)

    def _pack(self, region: Region, mode: GraphMode, x: fx.Node) -> fx.Node:
        if self.activation_sparsity == 0 and self.activation_bits is None:
            return add_keeping_site(region, mode, x, by=self.name)
        name = x.name if mode == "both" else f"{x.name}_{mode}"
        code = None
        if self.activation_bits is not None:
            code = BlockCode(
                self.activation_bits, self.activation_block, self.activation_levels, self.activation_rounding
            )
        site = PackActivation(
            self.activation_sparsity,
            sample=self.threshold_sample,
            interval=self.threshold_interval,
            value_dtype=self.packed_dtype,
            code=code,
            seed=noise_seed(region, name, self.seed),
        )
        target = add_site(region, name, site)
        with x.graph.inserting_after(x):
            node = x.graph.call_module(target, (x,))
        set_provenance(node, by=self.name, origin=x.name)
        return node
