"""How layers and products tie channels: what they read leaves its unit there, what they give begins another.

Every rule returns the channels of the result, or None for a call that channels are not followed through.
"""

from typing import Any

import numpy as np
from torch import Tensor, fx

from fedmef_fx.export.compact.ties import Dims, Exit, State, Ties, title
from fedmef_fx.graph.operations import Operation

__all__ = ["attention", "conv", "embedding", "linear", "matmul", "per_channel", "statistics"]


def _rows_and_columns(ties: Ties, operation: Operation) -> tuple[Tensor, Dims] | None:
    """The weight of a layer and its channels; None where the weight is computed."""
    weight = ties.region.tensor(operation.options["weight"])
    return None if weight is None else (weight, ties.parameter(weight))


def linear(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """How the features of a linear layer depend on those of its input."""
    found = _rows_and_columns(ties, operation)
    if found is None:
        return None
    weight, (rows, columns) = found
    x = ties.of(operation.x)
    touch = (weight != 0).numpy()
    _leave(ties, node, (x[-1], columns), ((operation.x, len(x) - 1),), rows, touch)
    _tie_bias(ties, operation.options.get("bias"), rows)
    return (*x[:-1], rows)


def _leave(ties: Ties, node: fx.Node, mixed: Any, reads: Any, rows: Any, touch: Any) -> None:
    """Rule 2 of `_tie_rules`: inputs are tied to columns, and leave their unit here."""
    inputs, columns = mixed
    common = ties.tie(inputs, columns, f"{title(node)} reads it together with inputs of the model")
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


def conv(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """How the channels of a convolution depend on those of its input."""
    found = _rows_and_columns(ties, operation)
    if found is None:
        return None
    weight, dims = found
    groups, transposed = int(operation.options.get("groups", 1)), operation.is_transposed
    x, at = ties.of(operation.x), ties.shape(operation.x)
    channel = len(x) - (weight.dim() - 2) - 1
    for spatial in (*x[channel + 1 :], *dims[2:]):
        ties.anchor(spatial, f"{title(node)} slides along it")
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
    groups, transposed = int(operation.options["groups"]), operation.is_transposed
    x = ties.of(operation.x)
    inputs = x[channel]
    first = dims[0]  # out of a convolution, in of a transposed one
    ties.anchor(dims[1], f"{title(node)} has as many inputs in each group")
    out = ties.fresh(ties.shape(node)[channel])
    if inputs is None or first is None:
        reason = f"{title(node)} is grouped and reads inputs of the model"
        for kept in (inputs, first, out):
            ties.anchor(kept, reason)
    else:
        ties.tie(first, inputs if transposed else out, "")
        for group in np.concatenate([inputs.reshape(groups, -1), out.reshape(groups, -1)], axis=1):
            ties.block(group)
        ties.groups[node] = inputs
    _tie_bias(ties, operation.options.get("bias"), out)
    return (*x[:channel], out, *(None,) * (len(ties.shape(node)) - channel - 1))


def per_channel(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """BatchNorm and PReLU: a few numbers per channel, along dimension 1."""
    x = ties.of(operation.x)
    if operation.kind == "batch_norm" and operation.options.get("running_mean") is None:
        return None
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = operation.options.get(name)
        if value is None:
            continue
        dims = ties.parameter(value) if isinstance(value, Tensor) else ties.of(value)
        if len(dims) != 1 or (dims[0] is None and operation.kind == "batch_norm"):
            return None
        if dims[0] is not None:
            ties.tie(dims[0], x[1], f"{title(node)} follows a dimension that is never cut")
    if operation.options.get("training") not in (None, False):
        return None
    return x


def statistics(ties: Ties, node: fx.Node, operation: Operation) -> State:
    """Ties of a normalisation that takes statistics over several channels: those stay."""
    x = ties.of(operation.x)
    mixed = x[-len(shape) :] if (shape := operation.options.get("normalized_shape")) else x[1:]
    for channels in mixed:
        ties.anchor(channels, f"{title(node)} takes statistics over all channels")
    for source in node.all_input_nodes[1:]:
        ties.anchor_all(ties.dims[source], f"{title(node)} takes statistics over all channels")
    return x


def matmul(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Ties of a product of two tensors: what is summed over has to stay the same in both."""
    left, right = operation.x, operation.options["other"]
    a, b = ties.of(left), ties.of(right)
    if len(a) < 2 or len(b) < 2:
        return None
    common = ties.tie(a[-1], b[-2], f"{title(node)} multiplies it with inputs of the model")
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
                common = ties.tie(common, other, f"{title(node)} multiplies it with something that keeps all channels")
            result[2 - back] = common
    return tuple(result)


def attention(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """softmax(q k^T / sqrt(d)) v: leading dimensions are heads; the scale depends on d."""
    query, key, value = (operation.options.get(name) for name in ("query", "key", "value"))
    if len({len(ties.of(x)) for x in (query, key, value)}) != 1 or operation.options.get("enable_gqa"):
        return None
    for x in (query, key):
        ties.anchor(ties.of(x)[-1], f"{title(node)} takes products over it")
        ties.anchor(ties.of(x)[-2], f"{title(node)} normalises over it")
    ties.anchor(ties.of(value)[-2], f"{title(node)} normalises over it")
    mask = operation.options.get("attn_mask")
    heads = _batch_dims(ties, node, (query, key, value, *([mask] if isinstance(mask, fx.Node) else [])))
    return (*heads, None, ties.of(value)[-1])


def embedding(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Ties of an embedding: its last dimension is that of its weight."""
    weight = operation.options.get("weight")
    if operation.options.get("max_norm") is not None:
        return None
    dims = ties.parameter(weight) if isinstance(weight, Tensor) else ties.of(weight)
    if len(dims) != 2:
        return None
    ties.anchor(dims[0], f"{title(node)} looks rows up")
    return (*(None,) * (len(ties.shape(node)) - 1), dims[1])
