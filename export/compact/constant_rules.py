"""What each kind of operation makes of constant slices: one rule per kind, for `Constants` to apply.

A rule gets the constants that are known so far, the node and its operation, and returns the constants of the result,
per dimension; None where it knows nothing.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fedmef_fx.export.compact.constant_views import (
    concatenated,
    indexed,
    permuted,
    reshaped,
    split_parts,
    unbound,
)
from fedmef_fx.export.compact.known_slices import FloatArray, KnownSlices, Slices
from fedmef_fx.export.compact.ties import Ties
from fedmef_fx.graph.operations import Operation, operation_of
from fedmef_fx.graph.operators import Pooling

__all__ = ["RULES", "can_fold"]


def can_fold(ties: Ties, node: fx.Node) -> bool:
    """Whether a layer adds the same number at every position for a constant input: not where zeros are padded."""
    operation = operation_of(ties.region, node)
    bias = operation.options.get("bias")
    if bias is not None and ties.region.tensor(bias) is None:
        return False
    if operation.kind == "linear":
        return True
    padding = operation.options.get("padding", 0)
    unpadded = padding in (0, "valid") or (isinstance(padding, tuple | list) and not any(padding))
    return operation.kind == "conv" and not operation.is_transposed and unpadded


def _same(c: KnownSlices, _: fx.Node, operation: Operation) -> Any:
    return c.slices.get(operation.x)


def _elementwise(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    """The operation itself, on the constants."""
    known = c.slices.get(operation.x)
    x = operation.x
    if not isinstance(known, tuple) or any(argument is not x for argument in node.all_input_nodes):
        return None
    module = c.ties.region.module(node)

    def apply(values: FloatArray | None) -> FloatArray | None:
        if values is None or np.isnan(values).all():
            return None
        given = torch.from_numpy(np.where(np.isnan(values), 0.0, values))
        args, kwargs = pytree.tree_map(lambda a: given if a is x else a, (node.args, dict(node.kwargs)))
        if module is not None:
            result = module(given.clone())
        elif isinstance(node.target, str):
            result = getattr(args[0].clone(), node.target)(*args[1:], **kwargs)
        else:
            result = node.target(*(a.clone() if a is given else a for a in args), **kwargs)
        if not isinstance(result, Tensor) or result.shape != given.shape:
            return None
        return np.where(np.isnan(values), np.nan, result.detach().double().numpy())

    with torch.no_grad():
        return tuple(apply(values) for values in known)


_ARITHMETIC: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
}


def _arithmetic(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    shape, operands = c.ties.shape(node), operation.options["operands"]
    result: list[FloatArray | None] = []
    for dim, size in enumerate(shape):
        back = len(shape) - dim
        left, right = (_operand(c, operand, back, size) for operand in operands)
        with np.errstate(all="ignore"):
            values = _ARITHMETIC[operation.kind](left, right)
        if operation.kind == "mul":
            values = np.where((left == 0) | (right == 0), 0.0, values)
        if operation.kind == "div":
            values = np.where((left == 0) & (right != 0) & _is_number(operands[1]), 0.0, values)
        result.append(np.where(np.isfinite(values), values, np.nan))
    return tuple(result)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _operand(c: KnownSlices, operand: Any, back: int, size: int) -> FloatArray:
    """An operand's constants along a dimension counted from the last; NaN where it is not constant there."""
    if _is_number(operand):
        return np.full(size, float(operand))
    shape = c.ties.shape(operand)
    if len(shape) >= back and shape[-back] == size:
        found = c.of(operand, -back)
        return np.full(size, np.nan) if found is None else found
    return np.full(size, np.nan)


def _conv(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    dims = c.ties.of(node)
    weight = c.ties.region.tensor(operation.options["weight"])
    if weight is None or not dims:
        return None
    groups = int(operation.options.get("groups", 1))
    channel = len(dims) - 1 if operation.kind == "linear" else len(dims) - (weight.dim() - 2) - 1
    size = c.ties.shape(node)[channel]
    x = c.of(operation.x, channel)
    x = np.full(c.ties.shape(operation.x)[channel], np.nan) if x is None else x
    sums, touch = c.layer(node, operation)
    if groups > 1:
        sums, touch = _ungrouped(sums, touch, groups, transposed=operation.is_transposed)
    known = ~np.isnan(x) if can_fold(c.ties, node) else x == 0
    open_ = (touch & ~known[None, :]).any(1)
    values = np.where(open_, np.nan, sums @ np.where(known, x, 0.0) + c.bias(node, operation, size))
    return tuple(values if dim == channel else None for dim in range(len(dims)))


def _ungrouped(sums: Any, touch: Any, groups: int, *, transposed: bool) -> tuple[Any, Any]:
    """Grouped rows as rows over all inputs; they come as [out, in/groups], transposed ones as [out/groups, in]."""
    if transposed:
        per_group, inputs = sums.shape
        wide = [np.zeros((groups, per_group, inputs), dtype=a.dtype) for a in (sums, touch)]
        width = inputs // groups
        for group in range(groups):
            at = slice(group * width, (group + 1) * width)
            wide[0][group][:, at], wide[1][group][:, at] = sums[:, at], touch[:, at]
        return wide[0].reshape(-1, inputs), wide[1].reshape(-1, inputs)
    outputs, width = sums.shape
    columns = (np.arange(outputs) // (outputs // groups))[:, None] * width + np.arange(width)[None, :]
    result = []
    for array in (sums, touch):
        full = np.zeros((outputs, width * groups), dtype=array.dtype)
        np.put_along_axis(full, columns, array, axis=1)
        result.append(full)
    return result[0], result[1]


def _batch_norm(c: KnownSlices, _: fx.Node, operation: Operation) -> Slices | None:
    x = c.slices.get(operation.x)
    if not isinstance(x, tuple) or len(x) < 2:
        return None
    tensors = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = operation.options.get(name)
        tensor = value if isinstance(value, Tensor) else c.ties.region.tensor(value)
        tensors[name] = None if tensor is None else tensor.detach().double().numpy()
    if tensors["running_mean"] is None or tensors["running_var"] is None:
        return None
    given = np.full(len(tensors["running_mean"]), np.nan) if x[1] is None else x[1]
    values = (given - tensors["running_mean"]) / np.sqrt(tensors["running_var"] + operation.options.get("eps", 1e-5))
    if tensors["weight"] is not None:  # a scale of 0 leaves the shift, whatever comes in
        values = np.where(tensors["weight"] == 0, 0.0, values * tensors["weight"])
    values = values if tensors["bias"] is None else values + tensors["bias"]
    return tuple(values if dim == 1 else None for dim in range(len(x)))


def _prelu(c: KnownSlices, _: fx.Node, operation: Operation) -> Slices | None:
    x = c.slices.get(operation.x)
    return tuple(_zeros_only(values) for values in x) if isinstance(x, tuple) else None


def _zeros_only(values: FloatArray | None) -> FloatArray | None:
    return None if values is None else np.where(values == 0, 0.0, np.nan)


def _pool(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    x, pooling = c.slices.get(operation.x), operation.row
    if not isinstance(x, tuple) or operation.options.get("return_indices"):
        return None
    kept = len(x) - pooling.spatial if isinstance(pooling, Pooling) else 2
    exact = isinstance(pooling, Pooling) and pooling.keeps_constants
    pass_on = (values if exact else _zeros_only(values) for values in x[:kept])
    return (*pass_on, *(None,) * (len(c.ties.shape(node)) - kept))


def _pad(c: KnownSlices, _: fx.Node, operation: Operation) -> Slices | None:
    x = c.slices.get(operation.x)
    if (
        not isinstance(x, tuple)
        or "pad" not in operation.options
        or operation.options.get("value") not in (None, 0, 0.0)
    ):
        return None
    kept = len(x) - len(operation.options["pad"]) // 2
    return tuple(_zeros_only(values) if dim < kept else None for dim, values in enumerate(x))


def _reduce(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    x, dim = c.slices.get(operation.x), operation.options.get("dim")
    if not isinstance(x, tuple) or dim is None:
        return None
    reduced = {index % len(x) for index in ([dim] if isinstance(dim, int) else dim)}
    kept = [values if operation.kind == "mean" else _zeros_only(values) for values in x]
    if len(c.ties.shape(node)) == len(x):
        return tuple(None if index in reduced else values for index, values in enumerate(kept))
    return tuple(values for index, values in enumerate(kept) if index not in reduced)


def _matmul(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    """Zero rows of the left factor and zero columns of the right one; a zero batch entry of either."""
    left, right = operation.x, operation.options["other"]
    return _product(c, node, rows=left, columns=right)


def _attention(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    """A weighted mean of the values: zero where they are, whatever the weights."""
    value = operation.options.get("value")
    return _product(c, node, rows=None, columns=value)


def _product(c: KnownSlices, node: fx.Node, *, rows: Any, columns: Any) -> Slices | None:
    shape = c.ties.shape(node)
    result: list[FloatArray | None] = []
    for dim, size in enumerate(shape):
        back = len(shape) - dim
        factors = {1: (columns,), 2: (rows,)}.get(back, (rows, columns))
        zero = np.zeros(size, dtype=np.bool_)
        for factor in factors:
            if factor is not None:
                zero |= _operand(c, factor, back, size) == 0
        result.append(np.where(zero, 0.0, np.nan))
    return tuple(result)


RULES: Final[dict[str, Callable[[KnownSlices, fx.Node, Operation], Any]]] = {
    "add": _arithmetic,
    "attention": _attention,
    "batch_norm": _batch_norm,
    "cat": concatenated,
    "conv": _conv,
    "div": _arithmetic,
    "elementwise": _elementwise,
    "getitem": indexed,
    "identity": _same,
    "interpolate": _pool,
    "linear": _conv,
    "matmul": _matmul,
    "mean": _reduce,
    "mul": _arithmetic,
    "pad": _pad,
    "permute": permuted,
    "pool": _pool,
    "prelu": _prelu,
    "reshape": reshaped,
    "split": split_parts,
    "sub": _arithmetic,
    "sum": _reduce,
    "unbind": unbound,
}
