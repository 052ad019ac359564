"""What passes ask about nodes: is this a convolution, where does its weight come from, what follows it."""

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.graph.program import Region
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight

__all__ = [
    "ADDITIONS",
    "CONVOLUTIONS",
    "TRANSPOSED",
    "VIEWS",
    "bound",
    "is_inplace",
    "is_layer",
    "is_view",
    "layers",
    "owns_input",
    "single_user",
    "source_of_weight",
    "without_views",
]

CONVOLUTIONS: Final[dict[Callable[..., Any], int]] = {
    F.conv1d: 1,
    F.conv2d: 2,
    F.conv3d: 3,
    F.conv_transpose1d: 1,
    F.conv_transpose2d: 2,
    F.conv_transpose3d: 3,
}
"""Functional convolutions and their number of spatial dimensions."""

TRANSPOSED: Final = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})

ADDITIONS: Final = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
"""Targets of nodes that add two tensors."""

VIEWS: Final[frozenset[Callable[..., Any] | str]] = frozenset(
    {
        operator.getitem,
        torch.flatten,
        torch.permute,
        torch.reshape,
        torch.squeeze,
        torch.t,
        torch.transpose,
        torch.unflatten,
        torch.unsqueeze,
        "contiguous",
        "expand",
        "flatten",
        "permute",
        "reshape",
        "squeeze",
        "t",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
    }
)
"""Targets of nodes whose result shares its argument's storage, or may."""

_VIEW_MODULES: Final = (nn.Flatten, nn.Identity, nn.Unflatten)


_LAYER_SIGNATURE: Final = ("input", "weight", "bias")
_CONVOLUTION_SIGNATURE: Final = (*_LAYER_SIGNATURE, "stride", "padding", "dilation", "groups")
_TRANSPOSED_SIGNATURE: Final = (*_LAYER_SIGNATURE, "stride", "padding", "output_padding", "groups", "dilation")


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments by name that a node gives to a functional convolution, linear or any Python function.

    torch's builtins have no signature that Python can read, so those of the layers stand here.
    """
    target = node.target
    if target in TRANSPOSED:
        names: tuple[str, ...] = _TRANSPOSED_SIGNATURE
    elif target in CONVOLUTIONS:
        names = _CONVOLUTION_SIGNATURE
    elif target is F.linear:
        names = _LAYER_SIGNATURE
    else:
        names = tuple(inspect.signature(target).parameters) if callable(target) else ()
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def single_user(node: fx.Node) -> fx.Node | None:
    """The only node that uses a node, None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_view(region: Region, node: fx.Node) -> bool:
    """Whether a node's result shares the storage of its first argument, or may."""
    if node.op == "call_module":
        module = region.module(node)
        return isinstance(module, _VIEW_MODULES)
    return node.op in ("call_function", "call_method") and node.target in VIEWS


def without_views(region: Region, node: object) -> object:
    """Follow views back to the node whose storage they share."""
    while isinstance(node, fx.Node) and is_view(region, node) and node.args:
        node = node.args[0]
    return node


def source_of_weight(region: Region, node: object) -> str | None:
    """The parameter a weight argument is made from, through masks, NSConv and views; None for anything else.

    Args:
        region: The region of the node.
        node: The weight argument of a layer.

    Returns:
        The target of the `get_attr` node.
    """
    node = without_views(region, node)
    while isinstance(node, fx.Node) and node.target in (masked_weight, nsconv_weight):
        node = without_views(region, node.args[0])
    if not isinstance(node, fx.Node) or not isinstance(region.tensor(node), nn.Parameter):
        return None
    return str(node.target)


def is_inplace(region: Region, node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(region.module(node), "inplace", False))
    if node.kwargs.get("inplace") or node.target in (operator.iadd, operator.imul, operator.isub, operator.itruediv):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    return name.endswith("_") and not name.endswith("__")


def is_layer(node: fx.Node) -> bool:
    """Whether a node is a functional convolution or linear layer."""
    return node.op == "call_function" and (node.target in CONVOLUTIONS or node.target is F.linear)


def layers(graph: fx.Graph) -> Iterator[fx.Node]:
    """The functional convolutions and linear layers of a graph, in order."""
    yield from filter(is_layer, graph.nodes)


def owns_input(region: Region, node: fx.Node) -> bool:
    """Whether a node is the only one that reads its input's storage, as far as views show."""
    x = node.args[0] if node.args else None
    while isinstance(x, fx.Node):
        if len(x.users) != 1 or x.op in ("placeholder", "get_attr"):
            return False
        if not is_view(region, x):
            return True
        x = x.args[0]
    return False
