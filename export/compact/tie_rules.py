"""How each operation ties channels: from a traced graph to `Ties`.

1. An operation on single elements passes channels on; one on several tensors ties what it aligns.
2. A convolution, a linear layer or a product ties its input to the columns of its weight, where channels leave their
   unit (`Exit`), and its output to the rows. Channels of a grouped convolution leave in whole groups, with their rows.
3. What moves indices (reshape, permute, concatenation, parts) moves channels. Of a dimension that is split, whole
   entries of the second to last new dimension can leave: heads of an attention, groups of channels.
4. Anything else keeps the channels it reads for good, and says so.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from fedmef_fx.export.compact.layer_ties import attention, conv, embedding, linear, matmul, per_channel, statistics
from fedmef_fx.export.compact.ties import Dims, Exit, State, Ties, title
from fedmef_fx.export.compact.view_ties import expanded, indexed, permuted, reshaped, split_part, unbound
from fedmef_fx.graph.operations import Operation, operation_of
from fedmef_fx.graph.operators import Pooling

__all__ = ["tie_channels"]


def tie_channels(ties: Ties, graph: fx.Graph) -> None:
    """Fill `ties` from a graph, in order."""
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = ties.region.tensor(node)
            ties.dims[node] = ties.parameter(tensor) if tensor is not None else ()
            continue
        if node.op == "placeholder":
            ties.dims[node] = _never_cut(ties.shapes.get(node))
            continue
        operation = operation_of(ties.region, node)
        rule = _RULES.get(operation.kind)
        state = None if rule is None else rule(ties, node, operation)
        ties.dims[node] = _unknown(ties, node) if state is None else state


def _never_cut(shape: Any) -> State:
    if isinstance(shape, torch.Size):
        return (None,) * len(shape)
    return [_never_cut(part) for part in shape] if isinstance(shape, list) else ()


def _unknown(ties: Ties, node: fx.Node) -> State:
    """Rule 4."""
    reason = f"{title(node)} is no operation that channels are followed through"
    for source in node.all_input_nodes:
        ties.anchor_all(ties.dims.get(source, ()), reason)
    return _never_cut(ties.shapes.get(node))


def _output(ties: Ties, node: fx.Node, _: Operation) -> State:
    for source in node.all_input_nodes:
        ties.anchor_all(ties.dims.get(source, ()), "it is an output of the model")
    return ()


def _pass_on(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    if ties.shape(operation.x) != ties.shape(node):
        return None
    return ties.of(operation.x)


def _metadata(_: Ties, __: fx.Node, ___: Operation) -> State:
    return ()


def _size(ties: Ties, node: fx.Node, operation: Operation) -> State:
    """A size is replaced by the number it has; only if it is read by dimension does it say which one."""
    if len(node.args) > 1 and isinstance(node.args[1], int):
        return ()
    for user in node.users:
        by_dimension = getattr(user.target, "__name__", "") == "getitem" and isinstance(user.args[1], int)
        if not by_dimension and operation_of(ties.region, user).kind != "metadata":
            ties.anchor_all(ties.of(operation.x), f"{title(node)} reads all sizes at once")
    return ()


def _broadcast(ties: Ties, node: fx.Node, operands: tuple[Any, ...]) -> Dims:
    """Rule 1 for several tensors: dimensions are aligned from the last one."""
    shape = ties.shape(node)
    result: list[Any] = [None] * len(shape)
    for back in range(1, len(shape) + 1):
        aligned = [
            ties.of(operand)[-back]
            for operand in operands
            if isinstance(operand, fx.Node) and len(ties.of(operand)) >= back and ties.shape(operand)[-back] != 1
        ]
        if not aligned:
            continue
        common = aligned[0]
        for other in aligned[1:]:
            common = ties.tie(common, other, f"{title(node)} combines it with something that keeps all channels")
        result[-back] = common if shape[-back] > 1 else None
    return tuple(result)


def _join(ties: Ties, node: fx.Node, operation: Operation) -> State:
    return _broadcast(ties, node, operation.options["operands"])


def _where(ties: Ties, node: fx.Node, _: Operation) -> State:
    return _broadcast(ties, node, tuple(node.all_input_nodes))


def _softmax(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    x, dim = ties.of(operation.x), operation.options.get("dim")
    if not isinstance(dim, int):
        return None
    ties.anchor(x[dim], f"{title(node)} normalises over it")
    return tuple(None if index == dim % len(x) else channels for index, channels in enumerate(x))


def _reduce(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    x, shape = ties.of(operation.x), ties.shape(operation.x)
    dim = operation.options.get("dim")
    if dim is None:
        return None
    reduced = {index % len(x) for index in ([dim] if isinstance(dim, int) else dim)}
    for index in reduced:
        channels = x[index]
        if operation.kind == "sum" and channels is not None:
            ties.exits.append(Exit(node, channels, "zero", ((operation.x, index),)))
        else:
            ties.anchor(channels, f"{title(node)} takes the mean over it")
    if len(ties.shape(node)) == len(shape):
        return tuple(None if index in reduced else channels for index, channels in enumerate(x))
    return tuple(channels for index, channels in enumerate(x) if index not in reduced)


def _pool(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    x, pooling = ties.of(operation.x), operation.row
    if not isinstance(pooling, Pooling) or operation.options.get("return_indices"):
        return None
    at = len(x) - pooling.spatial
    for channels in x[at:]:
        ties.anchor(channels, f"{title(node)} slides along it")
    return (*x[:at], *(None,) * pooling.spatial)


def _resize(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Padding and interpolation: dimensions that change size are never cut."""
    x, before, after = ties.of(operation.x), ties.shape(operation.x), ties.shape(node)
    if operation.kind == "pad" and "pad" not in operation.options:
        return None
    padded = len(operation.options.get("pad", ())) // 2
    changed = [size != after[index] or index >= len(x) - padded for index, size in enumerate(before)]
    if operation.kind == "interpolate":
        changed = [index >= 2 for index in range(len(x))]
    for channels, differs in zip(x, changed, strict=True):
        ties.anchor(channels if differs else None, f"{title(node)} changes its size")
    return tuple(None if differs else channels for channels, differs in zip(x, changed, strict=True))


def _cat(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    tensors, dim = operation.options["tensors"], operation.options.get("dim", 0)
    if not isinstance(tensors, list | tuple) or not isinstance(dim, int) or any(not ties.of(t) for t in tensors):
        return None
    dim %= len(ties.of(tensors[0]))
    result: list[Any] = []
    for index in range(len(ties.of(tensors[0]))):
        parts: list[Any] = [ties.of(tensor)[index] for tensor in tensors]
        if index == dim:
            sizes = [ties.shape(tensor)[index] for tensor in tensors]
            result.append(_concatenated(ties, parts, sizes))
            continue
        for other in parts[1:]:
            parts[0] = ties.tie(parts[0], other, f"{title(node)} aligns it with something that keeps all channels")
        result.append(parts[0])
    return tuple(result)


def _concatenated(ties: Ties, parts: list[Any], sizes: list[int]) -> Any:
    if all(part is None for part in parts):
        return None
    filled = []
    for part, size in zip(parts, sizes, strict=True):
        if part is None:  # inputs of the model, beside channels that may leave
            part = ties.fresh(size)  # noqa: PLW2901
            ties.anchor(part, "it is concatenated from a tensor that keeps all channels")
        filled.append(part)
    return np.concatenate(filled)


_RULES: Final[dict[str, Callable[[Ties, fx.Node, Operation], State | None]]] = {
    "add": _join,
    "attention": attention,
    "batch_norm": per_channel,
    "cat": _cat,
    "conv": conv,
    "div": _join,
    "elementwise": _pass_on,
    "embedding": embedding,
    "expand": expanded,
    "getitem": indexed,
    "group_norm": statistics,
    "identity": _pass_on,
    "interpolate": _resize,
    "join": _join,
    "layer_norm": statistics,
    "linear": linear,
    "masked_fill": _where,
    "matmul": matmul,
    "mean": _reduce,
    "metadata": _metadata,
    "mul": _join,
    "output": _output,
    "pad": _resize,
    "permute": permuted,
    "pool": _pool,
    "prelu": per_channel,
    "reshape": reshaped,
    "size": _size,
    "softmax": _softmax,
    "split": split_part,
    "sub": _join,
    "sum": _reduce,
    "unbind": unbound,
    "where": _where,
}
