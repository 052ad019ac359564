"""What passes ask about nodes: is this a convolution, where does its weight come from, what follows it."""

from collections.abc import Iterator

from torch import fx, nn

from fedmef_fx.graph.compiled import original_class
from fedmef_fx.graph.operators import Layer, Operator, operator_of, overrides, writes
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.nsconv import nsconv_weight

__all__ = [
    "is_addition",
    "is_inplace",
    "is_layer",
    "is_transposed",
    "is_view",
    "layer_row",
    "layers",
    "operator_at",
    "operator_of_module",
    "owns_input",
    "single_user",
    "source_of_weight",
    "without_views",
]


def operator_at(region: Region, node: fx.Node) -> Operator | None:
    """What is known of the operator that a node calls; None for what has no row, and for nodes that call nothing."""
    if node.op == "call_module":
        module = region.module(node)
        return None if module is None else operator_of_module(module)
    return operator_of(node.target) if node.op in ("call_function", "call_method") else None


def operator_of_module(module: nn.Module) -> Operator | None:
    """The row of what a module computes; None where its class overrides that."""
    cls = original_class(module)
    row = operator_of(cls)
    return None if row is None or overrides(cls) else row


def single_user(node: fx.Node) -> fx.Node | None:
    """The only node that uses a node, None where there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_view(region: Region, node: fx.Node) -> bool:
    """Whether a node's result shares the storage of its first argument, or may."""
    row = operator_at(region, node)
    return row is not None and row.is_view


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
    return node.op in ("call_function", "call_method") and (bool(node.kwargs.get("inplace")) or writes(node.target))


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds two tensors."""
    row = operator_of(node.target) if node.op in ("call_function", "call_method") else None
    return row is not None and row.kind == "add"


def layer_row(node: fx.Node) -> Layer | None:
    """The row of a functional convolution or linear layer, None for any other node."""
    row = operator_of(node.target) if node.op == "call_function" else None
    return row if isinstance(row, Layer) and row.plain is None else None


def is_layer(node: fx.Node) -> bool:
    """Whether a node is a functional convolution or linear layer."""
    return layer_row(node) is not None


def is_transposed(node: fx.Node) -> bool:
    """Whether a node is a functional transposed convolution."""
    row = layer_row(node)
    return row is not None and row.transposed


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
