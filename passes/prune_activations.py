"""Prune activations: layers keep the largest part of their input for backward, packed once for all of them.

Rules
1. `layer(x, weight, bias)` -> `pruned_convolution` / `pruned_linear`, which make their weight (dense, masked or
   NSConv) again in backward instead of keeping it.
2. x is packed right after it is made, by one `PackActivation` site that all layers reading x share. Where
   `compress-saved` keeps x already, or x is a cheap function of what it keeps, the layers take that instead.

Not packed, with the reason: an x that stays dense anyway because another node keeps it (the layer then keeps that same
tensor, at no cost and with exact gradients), and inputs of the model, which its caller holds.

Refused: ignored layers; geometry that is not static; asymmetric `padding="same"`.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.config import is_ignored
from fedmef_fx.graph.nodes import CONVOLUTIONS, TRANSPOSED, bound, layers, source_of_weight, without_views
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.saves import kept_tensors
from fedmef_fx.graph.sites import add_site
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.passes._handles import add_8_bit_site, handle_of
from fedmef_fx.records.graphs import GraphMode
from fedmef_fx.records.passes import PassResult, Refusal

__all__ = ["PruneActivations", "geometry_of", "prune_layer"]


@dataclasses.dataclass(frozen=True)
class PruneActivations:
    """The pass of this module; see the module docstring for its rules.

    Attributes:
        activation_sparsity: gamma, the share of an activation that is dropped, in [0, 1). 0 keeps all of it in 8 bits.
        threshold_sample: Elements sampled to estimate a threshold.
        threshold_interval: Training steps between estimates.
        ignore: Modules that are left alone, as in `Config.ignore`.
        packed_dtype: Type in which the kept values are stored; "same" as the activation's.
    """

    name: ClassVar[str] = "prune-activations"
    activation_sparsity: float = 0.9
    threshold_sample: int = 8192
    threshold_interval: int = 8
    ignore: tuple[str | type, ...] = ()
    packed_dtype: Literal["same", "bfloat16", "float16"] = "same"

    def run(self, program: Program) -> PassResult:
        """Apply the rules to every graph."""
        rewrites: list[str] = []
        refusals: list[Refusal] = []
        for region, mode, graph in program.graphs():
            if region.role == "fallback":
                continue  # serves rare calls, and takes no more memory in them than the original
            geometries = {node: self._match(region, node) for node in layers(graph)}
            chosen = self.matches(region, graph)
            refusals += [Refusal(region.full_name(n.name), g) for n, g in geometries.items() if isinstance(g, str)]
            kept = kept_tensors(region, graph, rewritten=set(chosen))
            packed: dict[fx.Node, fx.Node] = {}
            for node, geometry in chosen.items():
                x = node.args[0]
                root = without_views(region, x)
                if isinstance(x, fx.Node) and root in kept:
                    refusals.append(Refusal(region.full_name(x.name), f"stays dense: {kept[root]}"))
                elif isinstance(x, fx.Node) and x not in packed:
                    packed[x] = handle_of(region, x, by=self.name) or self._pack(region, mode, x)
                name = node.name
                prune_layer(node, packed.get(x) if isinstance(x, fx.Node) else None, geometry, by=self.name)
                rewrites.append(region.full_name(name))
        return PassResult(self.name, tuple(rewrites), tuple(dict.fromkeys(refusals)))

    def matches(self, region: Region, graph: fx.Graph) -> dict[fx.Node, dict[str, Any]]:
        """The layers that are rewritten, with their geometry."""
        found = {node: self._match(region, node) for node in layers(graph)}
        return {node: geometry for node, geometry in found.items() if not isinstance(geometry, str)}

    def _match(self, region: Region, node: fx.Node) -> dict[str, Any] | str:
        """The layer's geometry, or why it is left alone."""
        target = source_of_weight(region, node.args[1])
        if target is not None:
            path = target.rpartition(".")[0]
            if is_ignored(self.ignore, region.full_name(path), region.owner.get_submodule(path)):
                return "ignored by Config.ignore"
        if node.target is F.linear:
            return {}
        weight = None if target is None else region.owner.get_parameter(target)
        return geometry_of(node, weight)

    def _pack(self, region: Region, mode: GraphMode, x: fx.Node) -> fx.Node:
        if self.activation_sparsity == 0:
            return add_8_bit_site(region, mode, x, by=self.name)
        name = x.name if mode == "both" else f"{x.name}_{mode}"
        site = PackActivation(
            self.activation_sparsity,
            sample=self.threshold_sample,
            interval=self.threshold_interval,
            value_dtype=self.packed_dtype,
        )
        target = add_site(region, name, site)
        with x.graph.inserting_after(x):
            node = x.graph.call_module(target, (x,))
        set_provenance(node, by=self.name, origin=x.name)
        return node


def prune_layer(node: fx.Node, packed: fx.Node | None, geometry: dict[str, Any], *, by: str) -> fx.Node:
    """Rule 1 for one layer.

    Args:
        node: The functional convolution or linear layer.
        packed: Where its input is packed; None for an input that it keeps itself.
        geometry: From `geometry_of`; empty for a linear layer.
        by: The pass, for provenance.

    Returns:
        The node that takes its place.
    """
    x, stored, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight, gain, mask, form = _stored_weight(stored)
    op = pruned_linear if node.target is F.linear else pruned_convolution
    with node.graph.inserting_before(node):
        new = node.graph.call_function(op, (x, packed, weight, bias, gain, mask), {**geometry, **form})
    node.replace_all_uses_with(new)
    set_provenance(new, by=by, origin=node.name)
    node.graph.erase_node(node)
    if isinstance(stored, fx.Node) and not stored.users and stored.target in (masked_weight, nsconv_weight):
        stored.graph.erase_node(stored)
    return new


def _stored_weight(node: Any) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Weight, gain, mask and form from the node that makes a layer's weight."""
    if isinstance(node, fx.Node) and node.target is masked_weight:
        return node.args[0], None, node.args[1], {}
    if isinstance(node, fx.Node) and node.target is nsconv_weight:
        form = {key: node.kwargs[key] for key in ("g", "statistics")}
        return node.args[0], node.args[1], node.args[2], form
    return node, None, None, {}


def geometry_of(node: fx.Node, weight: nn.Parameter | None) -> dict[str, Any] | str:
    """The static geometry of a functional convolution as options of `pruned_convolution`, or why it has none.

    Args:
        node: The convolution.
        weight: Its dense weight; None where it is no parameter.
    """
    given, dims = bound(node), CONVOLUTIONS[node.target]  # type: ignore[index]  # a convolution's function
    options: dict[str, Any] = {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(name, default)
        options[name] = tuple(value) if isinstance(value, tuple | list) else (value,) * dims
        if isinstance(value, str):
            options[name] = _named_padding(value, weight, given.get("dilation", 1), dims)
            if isinstance(options[name], str):
                return str(options[name])
    options["groups"] = given.get("groups", 1)
    if node.target in TRANSPOSED:
        value = given.get("output_padding", 0)
        options |= {"transposed": True, "output_padding": tuple(value) if isinstance(value, tuple | list) else (value,)}
    if any(
        not isinstance(v, int) for value in options.values() for v in (value if isinstance(value, tuple) else (value,))
    ):
        return "its geometry is computed at run time"
    return options


def _named_padding(name: str, weight: nn.Parameter | None, dilation: Any, dims: int) -> tuple[int, ...] | str:
    if name == "valid":
        return (0,) * dims
    if weight is None:
        return 'padding="same" of a kernel whose size is not known'
    dilations = dilation if isinstance(dilation, tuple | list) else (dilation,) * dims
    total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
    if any(t % 2 for t in total):
        return 'padding="same" that is not symmetric'
    return tuple(t // 2 for t in total)
