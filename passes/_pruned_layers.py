"""Layers that make their weight again in backward: which there are, and how they are made, for `PruneActivations`."""

from typing import Any

from torch import fx, nn

from fedmef_fx.config import is_ignored
from fedmef_fx.graph.nodes import layer_row, layers, source_of_weight
from fedmef_fx.graph.operators import bound
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight

__all__ = ["geometry_of", "match_layer", "prunable_layers", "prune_layer"]


def prunable_layers(region: Region, graph: fx.Graph, *, ignore: tuple[str | type, ...]) -> set[fx.Node]:
    """The layers of a graph that become pruned layers."""
    return {node for node in layers(graph) if not isinstance(match_layer(region, node, ignore=ignore), str)}


def match_layer(region: Region, node: fx.Node, *, ignore: tuple[str | type, ...]) -> dict[str, Any] | str:
    """A layer's geometry, empty for a linear one; or why it is left alone.

    Args:
        region: The region of the layer.
        node: The layer.
        ignore: Modules that are left alone, as in `Config.ignore`.
    """
    target = source_of_weight(region, node.args[1])
    if target is not None:
        path = target.rpartition(".")[0]
        if is_ignored(ignore, region.full_name(path), region.owner.get_submodule(path)):
            return "ignored by Config.ignore"
    weight = None if target is None else region.owner.get_parameter(target)
    if weight is not None and weight.is_complex():
        return "its weight is complex"
    return geometry_of(node, weight)


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
    op = pruned_convolution if geometry else pruned_linear
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
    """The static geometry of a layer as options of `pruned_convolution`, or why it has none; empty for a linear one.

    Args:
        node: The functional layer.
        weight: Its dense weight; None where it is no parameter.
    """
    given, row = bound(node), layer_row(node)
    if row is None or row.spatial == 0:
        return {}
    dims = row.spatial
    options: dict[str, Any] = {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(name, default)
        options[name] = tuple(value) if isinstance(value, tuple | list) else (value,) * dims
        if isinstance(value, str):
            options[name] = _named_padding(value, weight, given.get("dilation", 1), dims)
            if isinstance(options[name], str):
                return str(options[name])
    options["groups"] = given.get("groups", 1)
    if row.transposed:
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
