"""A layer and the BatchNorm after it become one layer with an NSConv kernel, for `NormalizeKernels`."""

import torch
from torch import fx, nn

from fedmef_fx.graph.nodes import is_transposed, is_view, single_user
from fedmef_fx.graph.operations import nonlinearity
from fedmef_fx.graph.operators import bound
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.gain import activation_gain
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import Statistics, nsconv_weight
from fedmef_fx.passes._batch_norm_pairs import Pair
from fedmef_fx.sparse_model.masks import mask_name

__all__ = ["erase_unused", "normalize_pair", "output_channels"]


def normalize_pair(pair: Pair, *, statistics: Statistics, gains: dict[str, float], by: str) -> fx.Node:
    """Make one layer of a pair; the stored weights stay unchanged.

    Args:
        pair: The layer and its BatchNorm.
        statistics: Mean and deviation over "active" weights or over "all".
        gains: Gains by nonlinearity, which this adds to: a model has few kinds and many of each.
        by: The pass, for provenance.

    Returns:
        The node of the kernel.
    """
    region, layer, graph = pair.region, pair.layer, pair.layer.graph
    _ensure_affine(region, pair)
    masked = layer.args[1]
    is_masked = isinstance(masked, fx.Node) and masked.target is masked_weight
    with graph.inserting_before(layer):
        weight = graph.get_attr(pair.weight)
        mask = graph.get_attr(mask_name(pair.weight)) if is_masked else None
        gain, shift = graph.get_attr(f"{pair.path}.weight"), graph.get_attr(f"{pair.path}.bias")
        options = {
            "g": _following_gain(region, pair.norm, gains),
            "groups": bound(layer).get("groups", 1),
            "transposed": is_transposed(layer),
            "statistics": statistics,
        }
        kernel = graph.call_function(nsconv_weight, (weight, gain, mask), options)
    orphans = [*layer.all_input_nodes[1:], *pair.norm.all_input_nodes[1:]]
    layer.args = (layer.args[0], kernel, shift)
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    pair.norm.replace_all_uses_with(layer)
    graph.erase_node(pair.norm)
    erase_unused(orphans)
    for new in filter(None, (weight, mask, gain, shift, kernel)):
        set_provenance(new, by=by, origin=region.full_name(pair.path))
    return kernel


def _ensure_affine(region: Region, pair: Pair) -> None:
    norm = region.owner.get_submodule(pair.path)
    weight = region.owner.get_parameter(pair.weight)
    channels = output_channels(pair.layer, weight)
    for name, fill in (("weight", 1.0), ("bias", 0.0)):
        if getattr(norm, name, None) is None:
            value = torch.full((channels,), fill, dtype=weight.dtype, device=weight.device)
            norm.register_parameter(name, nn.Parameter(value))


def output_channels(layer: fx.Node, weight: nn.Parameter) -> int:
    """Number of output channels of a layer."""
    if not is_transposed(layer):
        return weight.shape[0]
    return int(weight.shape[1] * bound(layer).get("groups", 1))


def _following_gain(region: Region, norm: fx.Node, known: dict[str, float]) -> float:
    """Gain of the nonlinearity that reads a node's result, 1 if there is none or not exactly one user.

    Args:
        region: The region of the node.
        norm: The node.
        known: Gains by nonlinearity, which this adds to: a model has few kinds and many of each.
    """
    node = single_user(norm)
    while node is not None and is_view(region, node):
        node = single_user(node)
    function = None if node is None else nonlinearity(region, node)
    if node is None or function is None:
        return 1.0
    kind = f"{region.module(node) or node.target} {node.args[1:]} {node.kwargs}"
    return known[kind] if kind in known else known.setdefault(kind, activation_gain(function))


def erase_unused(nodes: list[fx.Node]) -> None:
    """Erase nodes that nothing reads any more, and then their inputs: reads of attributes and masked weights only."""
    for node in nodes:
        if not node.users and not node._erased and (node.op == "get_attr" or node.target is masked_weight):
            inputs = list(node.all_input_nodes)
            node.graph.erase_node(node)
            erase_unused(inputs)
