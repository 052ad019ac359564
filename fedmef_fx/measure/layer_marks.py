"""Let the layers of a model say when they run, whether Python calls them as modules or a graph calls their functions.

In a transformed model a convolution is a function that a graph calls, so that hooks on modules see nothing of it. Here
each node of a graph gets a call in front of it and behind it; both are given values that exist anyway, so that nothing
lives longer than without them.
"""

from typing import Any, Protocol

import torch
from torch import fx, nn

from fedmef_fx.graph.emit import program_of, recompile
from fedmef_fx.graph.program import Region, provenance
from fedmef_fx.sparse_model.masks import HOLDER, is_transformed

__all__ = ["LayerListener", "layer_of", "mark_layers"]

_SITES = "fedmef_sites"


class LayerListener(Protocol):
    """Hears when layers run."""

    def enter(self, path: str, inputs: Any = ()) -> None:
        """A layer begins."""

    def leave(self, result: Any) -> None:
        """The layer that began last ends."""


def mark_layers(model: nn.Module, listener: LayerListener) -> None:
    """Make a model tell which layer runs, for good: give it a copy.

    Args:
        model: Any model, transformed or not; it is changed.
        listener: Hears of every layer, innermost last.
    """
    for path, module in model.named_modules():
        is_own = path == HOLDER or _SITES in path.split(".")
        if path and not is_own and not isinstance(module, torch.jit.ScriptModule):
            _mark_module(module, path, listener)
    if not is_transformed(model):
        return
    for region, _, graph in program_of(model).graphs():
        for node in list(graph.nodes):
            if node.op in ("call_function", "call_method") or _is_site(node):
                _mark_node(node, layer_of(region, node), listener)
    recompile(model)


def _mark_module(module: nn.Module, path: str, listener: LayerListener) -> None:
    module.register_forward_pre_hook(
        lambda _, args, kwargs: listener.enter(path, (args, kwargs)), with_kwargs=True, prepend=True
    )
    # Also where the module raises, so that enter and leave stay in pairs.
    module.register_forward_hook(lambda _, __, result: listener.leave(result), always_call=True)


def _is_site(node: fx.Node) -> bool:
    return node.op == "call_module" and _SITES in str(node.target).split(".")


def _mark_node(node: fx.Node, path: str, listener: LayerListener) -> None:
    with node.graph.inserting_before(node):
        node.graph.call_function(listener.enter, (path, tuple(node.all_input_nodes)))
    with node.graph.inserting_after(node):
        node.graph.call_function(listener.leave, (node,))


def layer_of(region: Region, node: fx.Node) -> str:
    """The module of the original model that a node does the work of, as well as can be told.

    By rank: the module whose parameter the node reads; for a packing site the first layer that reads the packed copy;
    the module called; what the node was made from; the module whose forward was traced here; the node's own name.
    """
    if _is_site(node):
        reader = next((user for user in node.users if _parameter(region, user)), None)
        return layer_of(region, reader) if reader is not None else _origin(region, node)
    owner = _parameter(region, node)
    return region.full_name(owner.rpartition(".")[0]) if owner else _origin(region, node)


def _parameter(region: Region, node: fx.Node) -> str:
    """The first parameter that a node reads."""
    tensors = ((str(source.target), region.tensor(source)) for source in node.all_input_nodes)
    return next((target for target, tensor in tensors if isinstance(tensor, nn.Parameter)), "")


def _origin(region: Region, node: fx.Node) -> str:
    made = provenance(node)
    stack: Any = node.meta.get("nn_module_stack") or {}
    traced = [str(path) for path, *_ in stack.values()] if isinstance(stack, dict) else []
    if made is not None:
        return region.full_name(made[1])
    return region.full_name(traced[-1] if traced and traced[-1] else node.name)
