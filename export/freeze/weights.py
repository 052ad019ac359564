"""Masked weights and NSConv kernels are computed once and become the parameters themselves.

Rules
1. `masked_weight(w, mask)`, `nsconv_weight(w, gain, mask)` -> `get_attr w`, and w takes the value of the expression.
   All uses of a tied weight read the same parameter, under all of its names.
2. A parameter that is also read as it is, or in a second form, keeps its value; the expression then becomes a new
   parameter `<name>_folded`.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from fedmef_fx.errors import ExportError
from fedmef_fx.graph.operators import bound
from fedmef_fx.graph.program import Region
from fedmef_fx.module_tree import join
from fedmef_fx.ops.effective_weight import StoredWeight, effective_weight
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import KernelForm, nsconv_weight

__all__ = ["add_parameter", "erase_unread", "fold_weights", "readers"]

_EXPRESSIONS = (masked_weight, nsconv_weight)


def fold_weights(region: Region, graph: fx.Graph) -> None:
    """Apply the rules of this module to an eval graph and the parameters of its owner, in place.

    Raises:
        ExportError: A masked weight or NSConv kernel that is not made from a parameter.
    """
    by_parameter: dict[Tensor, dict[object, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    for node in graph.nodes:
        if node.target in _EXPRESSIONS:
            stored = _stored(region, node)
            identity = (id(stored.gain), id(stored.mask), stored.form)
            by_parameter[stored.weight][identity].append(node)
    reading = _readers_of_all(region, graph, by_parameter)
    for parameter, forms in by_parameter.items():
        values = [effective_weight(_stored(region, nodes[0])).clone() for nodes in forms.values()]
        folded = {node for nodes in forms.values() for node in nodes}
        others = (reader for reader in reading[parameter] if reader.target != "new_ones")
        is_read_otherwise = any(reader not in folded for reader in others)
        for index, (nodes, value) in enumerate(zip(forms.values(), values, strict=True)):
            names = [str(node.all_input_nodes[0].target) for node in nodes]
            if index == 0 and not is_read_otherwise:
                parameter.copy_(value)
            else:
                names = [add_parameter(region, f"{names[0]}_folded", value)] * len(nodes)
            for node, name in zip(nodes, names, strict=True):
                _read_instead(node, name)


def _stored(region: Region, node: fx.Node) -> StoredWeight:
    given = bound(node)
    weight, gain, mask = (region.tensor(given.get(name)) for name in ("weight", "gain", "mask"))
    if gain is None and getattr(given.get("gain"), "target", None) == "new_ones" and weight is not None:
        gain = weight.new_ones(given["gain"].args[1])
    if not isinstance(weight, nn.Parameter):
        raise ExportError(
            f"freeze: node {region.full_name(node.name)!r} ({node.target.__name__}) does not read a parameter; "  # type: ignore[union-attr]  # a function
            f"got {given['weight']!r}"
        )
    form = KernelForm(**{name: given[name] for name in KernelForm._fields if name in given})
    return StoredWeight(weight, gain, mask, form)


def _read_instead(node: fx.Node, name: str) -> None:
    with node.graph.inserting_before(node):
        read = node.graph.get_attr(name)
    node.replace_all_uses_with(read)
    node.graph.erase_node(node)


def readers(region: Region, graph: fx.Graph, tensor: Tensor) -> list[fx.Node]:
    """The nodes that read a parameter or buffer, under any of its names: its users, and the modules that hold it."""
    return _readers_of_all(region, graph, [tensor])[tensor]


def _readers_of_all(region: Region, graph: fx.Graph, tensors: Iterable[Tensor]) -> dict[Tensor, list[fx.Node]]:
    """`readers` of each tensor, in one walk through the graph."""
    found: dict[Tensor, list[fx.Node]] = {tensor: [] for tensor in tensors}
    for node in graph.nodes:
        module, read = region.module(node), region.tensor(node)
        if read is not None and read in found:
            found[read] += node.users
        elif module is not None:
            for held in {*module.parameters(), *module.buffers()} & found.keys():
                found[held].append(node)
    return found


def add_parameter(region: Region, name: str, value: Tensor) -> str:
    """Register a parameter with a region's owner; a number is appended where the name is taken.

    Returns:
        The target for `get_attr`.
    """
    path, _, leaf = name.rpartition(".")
    owner = region.owner.get_submodule(path)
    unique, number = leaf, 1
    while getattr(owner, unique, None) is not None:
        unique, number = f"{leaf}_{number}", number + 1
    owner.register_parameter(unique, nn.Parameter(value.detach(), requires_grad=torch.is_floating_point(value)))
    return join(path, unique)


def erase_unread(graph: fx.Graph) -> None:
    """Erase the reads of parameters and buffers that nothing uses.

    Other unused nodes stay: some of them write in place.
    """
    for node in (*graph.find_nodes(op="call_method", target="new_ones"), *graph.find_nodes(op="get_attr")):
        if not node.users:
            graph.erase_node(node)
