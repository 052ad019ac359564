"""What may be written over what it reads: rule 3 of `PruneActivations`.

- A convolution writes its result over its input, and the gradient of its input over that of its result, a few samples
  at a time, where the shapes are the same.
- The gradients of a tensor that two convolutions read are added up in the memory of the first. Where two results are
  added, the convolution that is the last to read the gradient of the sum writes over it.
- A sum is written over the result of a layer, and a sum or a layer's result times a number over that.

Nobody else may read what is written over: it is the result of an operation that keeps none of it, and no other node
reads it but the sites that encode it before. A gradient has to come from one reader alone, whose backward makes a
tensor for it.
"""

import operator
from typing import Any, Final

import torch
from torch import fx

from fedmef_fx.graph.origin import provenance, set_provenance
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.ops.in_place import add_over, mul_over
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.noise_site import NoiseSite
from fedmef_fx.ops.pooling import max_pool
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.ops.shared_gradient import shared_gradient, turns

__all__ = ["reuse_memory", "withdraw_claims"]

_LAYERS: Final = (pruned_convolution, pruned_linear)
_OWN_RESULT: Final = (*_LAYERS, sign_relu, add_over, mul_over)
_OWN_GRADIENT: Final = (*_LAYERS, sign_relu, mul_over)
_SUMS: Final = (operator.add, torch.add)
_PRODUCTS: Final = (operator.mul, torch.mul)
_SITES: Final = (NoiseSite,)


def reuse_memory(region: Region, graph: fx.Graph, *, by: str) -> None:
    """Let the nodes of a graph write over what is theirs alone.

    Args:
        region: The region of the graph.
        graph: The graph.
        by: The pass, for provenance.
    """
    for node in list(graph.nodes):
        if node.target in _SUMS and not node.kwargs:
            _write_sum(region, node, by=by)
        elif node.target in _PRODUCTS and not node.kwargs:
            _write_product(region, node, by=by)
    for node in list(graph.nodes):
        _share_gradient(region, node, by=by)
        _take_turns(region, node, by=by)
    for node in graph.nodes:
        if _is_convolution(node) and _keeps_shape(region, node):
            claims = {"over_input": _owns(region, node, node.args[0]), "over_gradient": _is_fresh(region, node)}
            node.kwargs = {**node.kwargs, **{name: True for name, holds in claims.items() if holds}}


def withdraw_claims(program: Program) -> None:
    """Let nodes no longer write over what somebody reads since: passes that ran later may have added readers."""
    for region, _, graph in program.graphs():
        _withdraw(region, graph)


def _withdraw(region: Region, graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is sign_relu:
            _withdraw_from_relu(region, node)
        elif node.target is max_pool and not _is_masked_later(node.args[0]):
            masks = ("masks", "high", "slope")
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in masks}
        elif node.target is add_over and not _owns(region, node, node.args[0]):
            options = dict(node.kwargs)
            node.args = node.args[::-1] if options.pop("is_second", False) else node.args
            node.target, node.kwargs = operator.add, options
        elif node.target is mul_over and not _owns(region, node, node.args[0]):
            node.target = operator.mul
        elif _is_convolution(node):
            _withdraw_from_convolution(region, node)


def _withdraw_from_relu(region: Region, node: Any) -> None:
    holds = {
        "inplace": len(_readers(region, node.args[0])) == 1,
        "inplace_gradient": _has_own_gradient(region, node),
        "masked_later": _is_pooled(region, node),
    }
    node.kwargs = {name: holds.get(name, True) and value for name, value in node.kwargs.items()}


def _withdraw_from_convolution(region: Region, node: Any) -> None:
    options = dict(node.kwargs)
    if not _owns(region, node, node.args[0]):
        options.pop("over_input", None)
    if not _is_fresh(region, node):
        options.pop("over_gradient", None)
    if "shared" in options and not _share(region, node.args[0]):
        del options["shared"]
    if "turns" in options and not all(
        _is_fresh(region, user) and len(_readers(region, node)) == 1 for user in _readers(region, node)
    ):
        del options["turns"]
    node.kwargs = options


def _is_pooled(region: Region, node: fx.Node) -> bool:
    """Whether a pooling that masks its gradient alone reads a node's result."""
    readers = _readers(region, node)
    return len(readers) == 1 and readers[0].target is max_pool and readers[0].args[0] is node


def _is_masked_later(x: Any) -> bool:
    return isinstance(x, fx.Node) and x.target is sign_relu and bool(x.kwargs.get("masked_later"))


def _share(region: Region, x: fx.Node) -> bool:
    readers = _readers(region, x)
    return len(readers) == 2 and all("shared" in reader.kwargs for reader in readers)


def _has_own_gradient(region: Region, node: fx.Node) -> bool:
    return len(_readers(region, node)) == 1 or _share(region, node)


def _write_sum(region: Region, node: fx.Node, *, by: str) -> None:
    terms = node.args
    if len(terms) != 2 or not all(isinstance(term, fx.Node) for term in terms):
        return
    own = next((term for term in terms if _owns(region, node, term)), None)
    if own is not None:
        options = {"is_second": True} if own is terms[1] else {}
        _replace(node, add_over, terms, options, by=by)


def _write_product(region: Region, node: fx.Node, *, by: str) -> None:
    if len(node.args) != 2:
        return
    x, factor = node.args
    if isinstance(factor, int | float) and not isinstance(factor, bool) and _owns(region, node, x):
        _replace(node, mul_over, (x, factor), {}, by=by)


def _share_gradient(region: Region, node: fx.Node, *, by: str) -> None:
    """Let two convolutions that alone read a tensor make one gradient for it."""
    readers = _readers(region, node)
    if len(readers) != 2 or not all(_is_convolution(reader) and reader.args[0] is node for reader in readers):
        return
    _meet(readers, "shared", shared_gradient, by=by)
    if node.target is sign_relu:
        node.kwargs = {**node.kwargs, "inplace_gradient": True}


def _take_turns(region: Region, node: fx.Node, *, by: str) -> None:
    """Let the last of two convolutions write over the gradient of the sum of their results."""
    is_sum = node.target is add_over or (node.target in _SUMS and not node.kwargs)
    terms = [term for term in node.args if isinstance(term, fx.Node)] if is_sum else []
    if len(terms) == 2 and _is_fresh(region, node) and all(_is_term(region, term, node) for term in terms):
        _meet(terms, "turns", turns, by=by)


def _is_term(region: Region, term: fx.Node, node: fx.Node) -> bool:
    return _is_convolution(term) and _readers(region, term) == [node]


def _is_convolution(node: fx.Node) -> bool:
    return node.target is pruned_convolution and not node.kwargs.get("transposed", False)


def _keeps_shape(region: Region, node: fx.Node) -> bool:
    """Whether results have the shape of their inputs."""
    weight = region.tensor(node.args[2])
    geometry: Any = node.kwargs
    if weight is None or weight.dim() < 3 or weight.shape[0] != weight.shape[1] * geometry["groups"]:
        return False
    axes = zip(weight.shape[2:], geometry["stride"], geometry["padding"], geometry["dilation"], strict=True)
    return all(step == 1 and 2 * padding == dilation * (kernel - 1) for kernel, step, padding, dilation in axes)


def _meet(layers: list[fx.Node], option: str, place: Any, *, by: str) -> None:
    """Give two layers a place to meet in backward."""
    if all(option in layer.kwargs for layer in layers):
        return
    first = min(layers)
    with first.graph.inserting_before(first):
        meeting = first.graph.call_function(place)
    set_provenance(meeting, by=by, origin=first.name)
    for layer in layers:
        layer.kwargs = {**layer.kwargs, option: meeting}


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...], options: dict[str, Any], *, by: str) -> None:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, options)
    new.meta = dict(node.meta)  # the module that it belongs to
    origin = provenance(node)
    node.replace_all_uses_with(new)
    set_provenance(new, by=by, origin=node.name if origin is None else origin[1])
    node.graph.erase_node(node)


def _owns(region: Region, node: fx.Node, x: Any) -> bool:
    """Whether a node is the only one that reads x, which whoever made it does not keep."""
    is_made = isinstance(x, fx.Node) and x.op == "call_function" and x.target in _OWN_RESULT
    return is_made and _readers(region, x) == [node]


def _is_fresh(region: Region, node: fx.Node) -> bool:
    """Whether the gradient of a node's result is a tensor that nobody else holds."""
    readers = _readers(region, node)
    if len(readers) != 1 or readers[0].op != "call_function":
        return False
    return readers[0].target in _OWN_GRADIENT and readers[0].args[0] is node


def _readers(region: Region, node: fx.Node) -> list[fx.Node]:
    """Who reads a node's result, but for the sites that encode it."""
    return [user for user in node.users if not isinstance(region.module(user), _SITES)]
