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
from torch import Tensor, fx

from fedmef_fx.export._operations import Operation, operation_of
from fedmef_fx.export._ties import Dims, Exit, State, Ties
from fedmef_fx.export._view_ties import expanded, indexed, permuted, reshaped, split_part, unbound
from fedmef_fx.passes._nodes import TRANSPOSED

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
        rule = _RULES.get(operation.kind, _unknown)
        ties.dims[node] = rule(ties, node, operation)


def _never_cut(shape: Any) -> State:
    if isinstance(shape, torch.Size):
        return (None,) * len(shape)
    return [_never_cut(part) for part in shape] if isinstance(shape, list) else ()


def _unknown(ties: Ties, node: fx.Node, _: Operation) -> State:
    """Rule 4."""
    reason = f"{_title(node)} is no operation that channels are followed through"
    for source in node.all_input_nodes:
        ties.anchor_all(ties.dims.get(source, ()), reason)
    return _never_cut(ties.shapes.get(node))


def _title(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{target} ({node.name})"


def _output(ties: Ties, node: fx.Node, _: Operation) -> State:
    for source in node.all_input_nodes:
        ties.anchor_all(ties.dims.get(source, ()), "it is an output of the model")
    return ()


def _pass_on(ties: Ties, node: fx.Node, operation: Operation) -> State:
    if ties.shape(operation.x) != ties.shape(node):
        return _unknown(ties, node, operation)
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
            ties.anchor_all(ties.of(operation.x), f"{_title(node)} reads all sizes at once")
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
            common = ties.tie(common, other, f"{_title(node)} combines it with something that keeps all channels")
        result[-back] = common if shape[-back] > 1 else None
    return tuple(result)


def _join(ties: Ties, node: fx.Node, operation: Operation) -> State:
    return _broadcast(ties, node, operation.options["operands"])


def _where(ties: Ties, node: fx.Node, _: Operation) -> State:
    return _broadcast(ties, node, tuple(node.all_input_nodes))


def _rows_and_columns(ties: Ties, operation: Operation) -> tuple[Tensor, Dims] | None:
    """The weight of a layer and its channels; None where the weight is computed."""
    weight = ties.region.tensor(operation.options["weight"])
    return None if weight is None else (weight, ties.parameter(weight))


def _linear(ties: Ties, node: fx.Node, operation: Operation) -> State:
    found = _rows_and_columns(ties, operation)
    if found is None:
        return _unknown(ties, node, operation)
    weight, (rows, columns) = found
    x = ties.of(operation.x)
    touch = (weight != 0).numpy()
    _leave(ties, node, (x[-1], columns), ((operation.x, len(x) - 1),), rows, touch)
    _tie_bias(ties, operation.options.get("bias"), rows)
    return (*x[:-1], rows)


def _leave(ties: Ties, node: fx.Node, mixed: Any, reads: Any, rows: Any, touch: Any) -> None:
    """Rule 2: inputs are tied to columns, and leave their unit here."""
    inputs, columns = mixed
    common = ties.tie(inputs, columns, f"{_title(node)} reads it together with inputs of the model")
    if common is not None:
        outputs = ties.fresh(0) if rows is None else rows
        ties.exits.append(Exit(node, common, "weights", reads, outputs, touch))


def _tie_bias(ties: Ties, bias: Any, rows: Any) -> None:
    if isinstance(bias, fx.Node):
        dims = ties.of(bias)
        if len(dims) == 1:
            ties.tie(dims[0], rows, "it is the bias of a layer of one channel")
        else:
            ties.anchor(rows, "its bias is computed")


def _conv(ties: Ties, node: fx.Node, operation: Operation) -> State:
    found = _rows_and_columns(ties, operation)
    if found is None:
        return _unknown(ties, node, operation)
    weight, dims = found
    groups, transposed = int(operation.options.get("groups", 1)), node.target in TRANSPOSED
    x, at = ties.of(operation.x), ties.shape(operation.x)
    channel = len(x) - (weight.dim() - 2) - 1
    for spatial in (*x[channel + 1 :], *dims[2:]):
        ties.anchor(spatial, f"{_title(node)} slides along it")
    if groups > 1:
        return _grouped(ties, node, operation, weight, dims, channel)
    columns, rows = (dims[0], dims[1]) if transposed else (dims[1], dims[0])
    touch = (weight != 0).flatten(2).any(2)
    _leave(
        ties, node, (x[channel], columns), ((operation.x, channel),), rows, (touch.T if transposed else touch).numpy()
    )
    _tie_bias(ties, operation.options.get("bias"), rows)
    return (*x[:channel], rows, *(None,) * (len(at) - channel - 1))


def _grouped(
    ties: Ties, node: fx.Node, operation: Operation, weight: Tensor, dims: Dims, channel: int
) -> State:  # inputs and outputs of a group leave together
    groups, transposed = int(operation.options["groups"]), node.target in TRANSPOSED
    x = ties.of(operation.x)
    inputs = x[channel]
    first = dims[0]  # out of a convolution, in of a transposed one
    ties.anchor(dims[1], f"{_title(node)} has as many inputs in each group")
    out = ties.fresh(ties.shape(node)[channel])
    if inputs is None or first is None:
        reason = f"{_title(node)} is grouped and reads inputs of the model"
        for kept in (inputs, first, out):
            ties.anchor(kept, reason)
    else:
        ties.tie(first, inputs if transposed else out, "")
        for group in np.concatenate([inputs.reshape(groups, -1), out.reshape(groups, -1)], axis=1):
            ties.block(group)
        ties.groups[node] = inputs
    _tie_bias(ties, operation.options.get("bias"), out)
    return (*x[:channel], out, *(None,) * (len(ties.shape(node)) - channel - 1))


def _per_channel(ties: Ties, node: fx.Node, operation: Operation) -> State:
    """BatchNorm and PReLU: a few numbers per channel, along dimension 1."""
    x = ties.of(operation.x)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = operation.options.get(name)
        if value is None:
            continue
        dims = ties.parameter(value) if isinstance(value, Tensor) else ties.of(value)
        if len(dims) != 1 or (dims[0] is None and operation.kind == "batch_norm"):
            return _unknown(ties, node, operation)
        if dims[0] is not None:
            ties.tie(dims[0], x[1], f"{_title(node)} follows a dimension that is never cut")
    if operation.options.get("training") not in (None, False):
        return _unknown(ties, node, operation)
    return x


def _statistics(ties: Ties, node: fx.Node, operation: Operation) -> State:
    x = ties.of(operation.x)
    mixed = x[-operation.options["dims"] :] if "dims" in operation.options else x[1:]
    for channels in mixed:
        ties.anchor(channels, f"{_title(node)} takes statistics over all channels")
    for source in node.all_input_nodes[1:]:
        ties.anchor_all(ties.dims[source], f"{_title(node)} takes statistics over all channels")
    return x


def _softmax(ties: Ties, node: fx.Node, operation: Operation) -> State:
    x, dim = ties.of(operation.x), operation.options.get("dim")
    if not isinstance(dim, int):
        return _unknown(ties, node, operation)
    ties.anchor(x[dim], f"{_title(node)} normalises over it")
    return tuple(None if index == dim % len(x) else channels for index, channels in enumerate(x))


def _reduce(ties: Ties, node: fx.Node, operation: Operation) -> State:
    x, shape = ties.of(operation.x), ties.shape(operation.x)
    dim = operation.options.get("dim")
    if dim is None:
        return _unknown(ties, node, operation)
    reduced = {index % len(x) for index in ([dim] if isinstance(dim, int) else dim)}
    for index in reduced:
        channels = x[index]
        if operation.kind == "sum" and channels is not None:
            ties.exits.append(Exit(node, channels, "zero", ((operation.x, index),)))
        else:
            ties.anchor(channels, f"{_title(node)} takes the mean over it")
    if len(ties.shape(node)) == len(shape):
        return tuple(None if index in reduced else channels for index, channels in enumerate(x))
    return tuple(channels for index, channels in enumerate(x) if index not in reduced)


def _pool(ties: Ties, node: fx.Node, operation: Operation) -> State:
    x = ties.of(operation.x)
    at = len(x) - operation.options["spatial"]
    for channels in x[at:]:
        ties.anchor(channels, f"{_title(node)} slides along it")
    return (*x[:at], *(None,) * operation.options["spatial"])


def _resize(ties: Ties, node: fx.Node, operation: Operation) -> State:
    """Padding and interpolation: dimensions that change size are never cut."""
    x, before, after = ties.of(operation.x), ties.shape(operation.x), ties.shape(node)
    padded = len(operation.options.get("pad", ())) // 2
    changed = [size != after[index] or index >= len(x) - padded for index, size in enumerate(before)]
    if operation.kind == "interpolate":
        changed = [index >= 2 for index in range(len(x))]
    for channels, differs in zip(x, changed, strict=True):
        ties.anchor(channels if differs else None, f"{_title(node)} changes its size")
    return tuple(None if differs else channels for channels, differs in zip(x, changed, strict=True))


def _matmul(ties: Ties, node: fx.Node, operation: Operation) -> State:
    left, right = operation.x, operation.options["other"]
    a, b = ties.of(left), ties.of(right)
    if len(a) < 2 or len(b) < 2:
        return _unknown(ties, node, operation)
    common = ties.tie(a[-1], b[-2], f"{_title(node)} multiplies it with inputs of the model")
    if common is not None:
        ties.exits.append(Exit(node, common, "zero", ((left, len(a) - 1), (right, len(b) - 2))))
    return (*_batch_dims(ties, node, (left, right)), a[-2], b[-1])


def _batch_dims(ties: Ties, node: fx.Node, operands: tuple[Any, ...]) -> Dims:
    """What operands have in common before their last two dimensions."""
    shape = ties.shape(node)[:-2]
    result: list[Any] = [None] * len(shape)
    for back in range(3, len(shape) + 3):
        aligned = [ties.of(x)[-back] for x in operands if len(ties.of(x)) >= back and ties.shape(x)[-back] != 1]
        if aligned:
            common = aligned[0]
            for other in aligned[1:]:
                common = ties.tie(common, other, f"{_title(node)} multiplies it with something that keeps all channels")
            result[2 - back] = common
    return tuple(result)


def _attention(ties: Ties, node: fx.Node, operation: Operation) -> State:
    """softmax(q k^T / sqrt(d)) v: leading dimensions are heads; the scale depends on d."""
    query, key, value = (operation.options.get(name) for name in ("query", "key", "value"))
    if len({len(ties.of(x)) for x in (query, key, value)}) != 1 or operation.options.get("enable_gqa"):
        return _unknown(ties, node, operation)
    for x in (query, key):
        ties.anchor(ties.of(x)[-1], f"{_title(node)} takes products over it")
        ties.anchor(ties.of(x)[-2], f"{_title(node)} normalises over it")
    ties.anchor(ties.of(value)[-2], f"{_title(node)} normalises over it")
    mask = operation.options.get("attn_mask")
    heads = _batch_dims(ties, node, (query, key, value, *([mask] if isinstance(mask, fx.Node) else [])))
    return (*heads, None, ties.of(value)[-1])


def _cat(ties: Ties, node: fx.Node, operation: Operation) -> State:
    tensors, dim = operation.options["tensors"], operation.options.get("dim", 0)
    if not isinstance(tensors, list | tuple) or not isinstance(dim, int) or any(not ties.of(t) for t in tensors):
        return _unknown(ties, node, operation)
    dim %= len(ties.of(tensors[0]))
    result: list[Any] = []
    for index in range(len(ties.of(tensors[0]))):
        parts: list[Any] = [ties.of(tensor)[index] for tensor in tensors]
        if index == dim:
            sizes = [ties.shape(tensor)[index] for tensor in tensors]
            result.append(_concatenated(ties, parts, sizes))
            continue
        for other in parts[1:]:
            parts[0] = ties.tie(parts[0], other, f"{_title(node)} aligns it with something that keeps all channels")
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


def _embedding(ties: Ties, node: fx.Node, operation: Operation) -> State:
    weight = operation.options.get("weight")
    dims = ties.parameter(weight) if isinstance(weight, Tensor) else ties.of(weight)
    if len(dims) != 2:
        return _unknown(ties, node, operation)
    ties.anchor(dims[0], f"{_title(node)} looks rows up")
    return (*(None,) * (len(ties.shape(node)) - 1), dims[1])


def _view(function: Callable[..., State | None]) -> Callable[[Ties, fx.Node, Operation], State]:
    def rule(ties: Ties, node: fx.Node, operation: Operation) -> State:
        result = function(ties, node, operation)
        return _unknown(ties, node, operation) if result is None else result

    return rule


_RULES: Final[dict[str, Callable[[Ties, fx.Node, Operation], State]]] = {
    "add": _join,
    "attention": _attention,
    "batch_norm": _per_channel,
    "cat": _cat,
    "conv": _conv,
    "div": _join,
    "elementwise": _pass_on,
    "embedding": _embedding,
    "expand": _view(expanded),
    "getitem": _view(indexed),
    "group_norm": _statistics,
    "identity": _pass_on,
    "interpolate": _resize,
    "join": _join,
    "layer_norm": _statistics,
    "linear": _linear,
    "masked_fill": _where,
    "matmul": _matmul,
    "mean": _reduce,
    "metadata": _metadata,
    "mul": _join,
    "output": _output,
    "pad": _resize,
    "permute": _view(permuted),
    "pool": _pool,
    "prelu": _per_channel,
    "reshape": _view(reshaped),
    "size": _size,
    "softmax": _softmax,
    "split": _view(split_part),
    "sub": _join,
    "sum": _reduce,
    "unbind": _view(unbound),
    "where": _where,
}
