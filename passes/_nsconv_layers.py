"""A layer and the BatchNorm after it become one layer with an NSConv kernel, for `NormalizeKernels`."""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn

from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.nodes import is_transposed, is_view, single_user
from fedmef_fx.graph.operations import nonlinearity
from fedmef_fx.graph.operators import bound
from fedmef_fx.graph.origin import set_provenance
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.gain import activation_gain
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import Statistics, channel_affine, nsconv_weight
from fedmef_fx.ops.scale_and_shift import ScaleAndShift
from fedmef_fx.passes._batch_norm_pairs import Pair

__all__ = ["StoredKernel", "calls_normalized", "normalize_layer", "normalize_pair", "read_mask", "stored_kernels"]

_FORM: Final = ("g", "groups", "transposed", "statistics")


class StoredKernel(NamedTuple):
    """An NSConv kernel in a graph, in a node of its own or as part of a pruned layer.

    Attributes:
        node: The node.
        weight: Reads the weight.
        mask: Reads the mask or bitmap; None without one.
        options: Of `KernelForm`.
    """

    node: fx.Node
    weight: fx.Node
    mask: fx.Node | None
    options: dict[str, Any]


def stored_kernels(graph: fx.Graph) -> Iterator[StoredKernel]:
    """The NSConv kernels of a graph."""
    for node in graph.nodes:
        if node.target is nsconv_weight:
            yield StoredKernel(node, node.args[0], node.args[2], dict(node.kwargs))
        elif node.target in (pruned_convolution, pruned_linear) and node.args[4] is not None:
            options = {name: node.kwargs[name] for name in _FORM if name in node.kwargs}
            yield StoredKernel(node, node.args[2], node.args[5], options)


def calls_normalized(module: nn.Module | None) -> bool:
    """Whether what a module returns comes straight from the scale and shift of an NSConv, where Python calls it."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    if isinstance(module, ScaleAndShift):
        return True
    table = None if module is None else next((t for owner, t in tables_in(module) if owner is module), None)
    graphs = [compiled.graph for entry in table.entries for compiled in entry.graphs.values()] if table else []
    return any(graph.find_nodes(op="call_function", target=channel_affine) for graph in graphs)


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
    with graph.inserting_before(layer):
        weight = graph.get_attr(pair.weight)
        mask = read_mask(layer)
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
    _erase_unused(orphans)
    for new in filter(None, (weight, mask, gain, shift, kernel)):
        set_provenance(new, by=by, origin=region.full_name(pair.path))
    return kernel


def normalize_layer(region: Region, layer: fx.Node, target: str, options: dict[str, Any], *, by: str) -> None:
    """Give a layer that is not called together with its BatchNorm its kernel, with a gain of 1.

    Args:
        region: The region of the layer.
        layer: The node.
        target: Of its weight.
        options: Of the kernel.
        by: The pass, for provenance.
    """
    graph = layer.graph
    channels = _output_channels(layer, region.owner.get_parameter(target))
    orphans = layer.all_input_nodes[1:]
    with graph.inserting_before(layer):
        weight = graph.get_attr(target)
        mask = read_mask(layer)
        gain = graph.call_method("new_ones", (weight, (channels,)))
        kernel = graph.call_function(nsconv_weight, (weight, gain, mask), options)
    layer.args = (layer.args[0], kernel, None)
    _erase_unused(orphans)
    for new in filter(None, (weight, mask, gain, kernel)):
        set_provenance(new, by=by, origin=region.full_name(target))


def read_mask(layer: fx.Node) -> fx.Node | None:
    """Read the mask of a layer's weight once more; of a shared weight it stands next to one of the weight's names."""
    masked = layer.args[1]
    if not isinstance(masked, fx.Node) or masked.target is not masked_weight:
        return None
    mask = masked.args[1]
    assert isinstance(mask, fx.Node)  # noqa: S101 -- insert-masks reads it as an attribute
    return layer.graph.get_attr(str(mask.target))


def _ensure_affine(region: Region, pair: Pair) -> None:
    norm = region.owner.get_submodule(pair.path)
    weight = region.owner.get_parameter(pair.weight)
    channels = _output_channels(pair.layer, weight)
    for name, fill in (("weight", 1.0), ("bias", 0.0)):
        if getattr(norm, name, None) is None:
            value = torch.full((channels,), fill, dtype=weight.dtype, device=weight.device)
            norm.register_parameter(name, nn.Parameter(value))


def _output_channels(layer: fx.Node, weight: nn.Parameter) -> int:
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


def _erase_unused(nodes: list[fx.Node]) -> None:
    """Erase nodes that nothing reads any more, and then their inputs: reads of attributes and masked weights only."""
    for node in nodes:
        if not node.users and not node._erased and (node.op == "get_attr" or node.target is masked_weight):
            inputs = list(node.all_input_nodes)
            node.graph.erase_node(node)
            _erase_unused(inputs)
