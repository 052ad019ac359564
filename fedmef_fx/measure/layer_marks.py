"""Let the layers of a model say when they run, whether Python calls them as modules or a graph calls their functions.

In a transformed model a convolution is a function that a graph calls, so that hooks on modules see nothing of it. Here
each node of a graph gets a call in front of it and behind it; both are given values that exist anyway, so that nothing
lives longer than without them.
"""

from typing import Any, Protocol

import torch
from torch import fx, nn

from fedmef_fx.graph.emit import program_of, recompile
from fedmef_fx.graph.origin import layer_of
from fedmef_fx.graph.sites import is_in_site, is_site
from fedmef_fx.sparse_model.gradient_masks import OWN
from fedmef_fx.sparse_model.transformation import CHILD_NAME, is_transformed

__all__ = ["LayerListener", "mark_layers"]


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
        is_own = path == CHILD_NAME or is_in_site(path)
        if path and not is_own and not isinstance(module, torch.jit.ScriptModule):
            _mark_module(module, path, listener)
    if not is_transformed(model):
        return
    for region, _, graph in program_of(model).graphs():
        for node in list(graph.nodes):
            if node.op in ("call_function", "call_method") or is_site(node):
                _mark_node(node, layer_of(region, node), listener)
    recompile(model)


def _mark_module(module: nn.Module, path: str, listener: LayerListener) -> None:
    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        listener.enter(path, (args, kwargs))

    def leave(_: nn.Module, __: Any, result: Any) -> None:
        listener.leave(result)

    for hook in (enter, leave):
        setattr(hook, OWN, True)
    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    # Also where the module raises, so that enter and leave stay in pairs.
    module.register_forward_hook(leave, always_call=True)


def _mark_node(node: fx.Node, path: str, listener: LayerListener) -> None:
    with node.graph.inserting_before(node):
        node.graph.call_function(listener.enter, (path, tuple(node.all_input_nodes)))
    with node.graph.inserting_after(node):
        node.graph.call_function(listener.leave, (node,))
