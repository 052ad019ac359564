"""What autograd keeps of a graph's tensors between forward and backward, node by node.

A tensor costs its bytes as long as one node keeps it, so pruning one layer's copy of it pays only if nothing else
keeps it dense. Unknown operations are taken to keep everything: too cautious costs memory, never correctness.
"""

import operator
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.graph.activations import activation
from fedmef_fx.graph.gradients import differentiable
from fedmef_fx.graph.nodes import ADDITIONS, is_inplace, is_view, without_views
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.dropout import BitDropout, bit_dropout
from fedmef_fx.ops.keeping import KeepActivation, recomputed, remasked
from fedmef_fx.ops.layers import pruned_convolution, pruned_linear
from fedmef_fx.ops.masking import masked_weight
from fedmef_fx.ops.norms import compressed_batch_norm, compressed_batch_norm_module, compressed_norm
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.ops.pooling import adaptive_avg_pool, avg_pool, max_pool
from fedmef_fx.ops.products import compressed_attention, compressed_matmul, compressed_mul
from fedmef_fx.ops.relu import sign_relu
from fedmef_fx.ops.smooth import compressed_activation, compressed_result

__all__ = ["Kept", "kept_by", "kept_tensors"]


class Kept(NamedTuple):
    """Which tensors of a node autograd keeps."""

    inputs: bool
    output: bool


_NOTHING: Final = Kept(inputs=False, output=False)
_INPUTS: Final = Kept(inputs=True, output=False)
_OUTPUT: Final = Kept(inputs=False, output=True)
_BOTH: Final = Kept(inputs=True, output=True)

_ACTIVATION_KEEPS: Final = {"inputs": _INPUTS, "output": _OUTPUT, "both": _BOTH}

_KEEP_NOTHING: Final[frozenset[Any]] = ADDITIONS | {
    F.dropout,  # keeps its noise, which is no activation
    F.embedding,  # and its indices
    F.interpolate,
    F.pad,
    F.pixel_shuffle,
    F.pixel_unshuffle,
    getattr,
    operator.sub,
    operator.isub,
    operator.neg,
    torch.cat,
    torch.chunk,
    torch.clone,
    torch.concat,
    torch.masked_fill,  # keeps its mask, as `where` does
    torch.mean,
    torch.neg,
    torch.split,
    torch.stack,
    torch.sub,
    torch.sum,
    torch.unbind,
    torch.where,
    torch._assert,
    "bfloat16",
    "chunk",
    "clone",
    "detach",
    "dim",
    "double",
    "float",
    "half",
    "masked_fill",
    "mean",
    "numel",
    "repeat",
    "size",
    "split",
    "sub",
    "sum",
    "to",
    "type",
    "type_as",
    "unbind",
    # Their inputs and results are not kept; what they keep instead is small.
    adaptive_avg_pool,
    avg_pool,
    bit_dropout,
    compressed_activation,
    compressed_attention,
    compressed_batch_norm,
    compressed_batch_norm_module,
    compressed_matmul,
    compressed_mul,
    compressed_norm,
    compressed_result,
    masked_weight,  # a parameter and a mask, which exist anyway
    max_pool,
    pruned_convolution,
    pruned_linear,
    recomputed,
    remasked,
    sign_relu,
}
_KEEP_OUTPUT: Final[frozenset[Any]] = frozenset(
    {
        F.log_softmax,
        F.softmax,
        torch.exp,
        torch.log_softmax,
        torch.rsqrt,
        torch.softmax,
        torch.sqrt,
        "exp",
        "log_softmax",
        "rsqrt",
        "softmax",
        "sqrt",
    }
)
_KEEP_INPUTS: Final[frozenset[Any]] = frozenset(
    {
        F.batch_norm,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.group_norm,
        F.layer_norm,
        F.linear,
        torch.abs,
        torch.log,
        torch.pow,
        operator.pow,
    }
)
_PRODUCTS: Final[frozenset[Any]] = frozenset(
    {operator.matmul, operator.mul, torch.bmm, torch.matmul, torch.mm, torch.mul, "bmm", "matmul", "mm", "mul"}
)
_SCALINGS: Final[frozenset[Any]] = frozenset({operator.mul, operator.truediv, torch.mul, torch.div, "mul", "div"})

_MODULES_KEEP_NOTHING: Final = (
    BitDropout,
    KeepActivation,
    PackActivation,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ChannelShuffle,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.Upsample,
    nn.ZeroPad2d,
)
_MODULES_KEEP_OUTPUT: Final = (nn.LogSoftmax, nn.Softmax)
_MODULES_KEEP_INPUTS: Final = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.LayerNorm,
)


def kept_by(region: Region, node: fx.Node) -> Kept:
    """What autograd keeps of a node's tensors, as PyTorch implements its operation."""
    if node.op == "call_module":
        return _kept_by_module(region.module(node))
    if node.op not in ("call_function", "call_method") or is_view(region, node):
        return _NOTHING
    if is_inplace(region, node) and node.target not in _KEEP_NOTHING:
        return _BOTH
    if node.target in _KEEP_NOTHING:
        return _NOTHING
    if node.target in _SCALINGS and _is_scaling(node):
        return _NOTHING
    row = activation(node.target)
    if row is not None:
        return _ACTIVATION_KEEPS[row.keeps]
    if node.target in _KEEP_OUTPUT:
        return _OUTPUT
    if node.target in _KEEP_INPUTS or node.target in _PRODUCTS:
        return _INPUTS
    return _BOTH


def _is_scaling(node: fx.Node) -> bool:
    """Whether a product or quotient of a tensor and a number is linear in the tensor."""
    if len(node.args) != 2 or len(node.all_input_nodes) != 1:
        return False
    first, second = (isinstance(argument, fx.Node) for argument in node.args)
    return (first and not second) or (second and not first and node.target in _PRODUCTS)


def _kept_by_module(module: nn.Module | None) -> Kept:
    kind = type(module)
    if kind in _MODULES_KEEP_NOTHING or isinstance(module, nn.Flatten | nn.Unflatten):
        return _NOTHING
    row = activation(kind)
    kept = None if row is None else _ACTIVATION_KEEPS[row.keeps]
    if getattr(module, "inplace", False) and kept is not _OUTPUT and kind not in _MODULES_KEEP_OUTPUT:
        return _BOTH
    if kept is not None:
        return kept
    if kind in _MODULES_KEEP_OUTPUT:
        return _OUTPUT
    return _INPUTS if kind in _MODULES_KEEP_INPUTS else _BOTH


def _inputs_kept(node: fx.Node, carriers: Collection[fx.Node]) -> list[fx.Node]:
    """The inputs that a node keeps, if it keeps them: a product needs an operand for the other one's gradient only."""
    operands = node.all_input_nodes
    if node.target not in _PRODUCTS or len(operands) != 2:
        return operands
    first, second = operands
    return [x for x, other in ((first, second), (second, first)) if other in carriers]


def _written_by(region: Region, node: fx.Node) -> fx.Node | None:
    """The node in whose storage a node writes, None for a node that writes into nothing."""
    if not node.args or not (is_inplace(region, node) or node.target is operator.setitem):
        return None
    root = without_views(region, node.args[0])
    return root if isinstance(root, fx.Node) else None


def kept_tensors(region: Region, graph: fx.Graph, *, rewritten: set[fx.Node]) -> dict[fx.Node, str]:
    """The tensors of a graph that stay dense between forward and backward, whatever is done to some nodes.

    Args:
        region: The region of the graph.
        graph: The graph.
        rewritten: Nodes that will keep none of their activations dense.

    Returns:
        The node in whose storage each such tensor lies, with who keeps it.
    """
    kept: dict[fx.Node, str] = {}
    is_whole = not region.path  # what goes in and out of an inner region mostly belongs to other regions
    results: list[fx.Node] = []
    carriers = differentiable(region, graph)

    def keep(tensor: object, reason: str) -> None:
        root = without_views(region, tensor)
        if isinstance(root, fx.Node):
            kept.setdefault(root, reason)

    for node in graph.nodes:
        if node.op == "placeholder" and is_whole:
            keep(node, "an input of the model, which its caller holds")
        elif node.op == "get_attr":
            keep(node, "a tensor of the model")
        elif node.op == "output":
            for tensor in node.all_input_nodes if is_whole else ():
                keep(tensor, "returned by the model")
        elif node.op != "placeholder" and node not in rewritten:
            what = kept_by(region, node)
            for tensor in _inputs_kept(node, carriers) if what.inputs else ():
                keep(tensor, f"{node.name} keeps its input")
            if what.output:
                results.append(node)
    for node in graph.nodes:
        written = _written_by(region, node)
        if written is not None and len(written.users) > 1:
            keep(written, f"{node.name} writes into it between its readers")
    # Last, since a reader that keeps a result is the better reason: a ReLU that is free to may forget its own.
    for node in results:
        keep(node, f"{node.name} keeps its result")
    return kept
