"""What operations that move indices make of constant slices: concatenation, reshape, permute, parts."""

from typing import Any

import numpy as np
import torch
from torch import fx

from fedmef_fx.export.compact.known_slices import FloatArray, KnownSlices, Slices
from fedmef_fx.export.compact.view_ties import full_index, matched_dims, part_sizes, permutation
from fedmef_fx.graph.operations import Operation

__all__ = ["concatenated", "indexed", "permuted", "reshaped", "split_parts", "unbound"]


def concatenated(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    """The constants of a concatenation: those of its parts, side by side."""
    tensors, dim = operation.options["tensors"], operation.options.get("dim", 0)
    if not isinstance(tensors, list | tuple):
        return None
    shape = c.ties.shape(node)
    parts = [c.of(t, dim) for t in tensors]
    sizes = [c.ties.shape(t)[dim] for t in tensors]
    filled = [np.full(n, np.nan) if p is None else p for p, n in zip(parts, sizes, strict=True)]
    return tuple(np.concatenate(filled) if index == dim % len(shape) else None for index in range(len(shape)))


def reshaped(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    """The constants of a reshaped tensor, where its channels stay together."""
    x = c.slices.get(operation.x)
    before, after = c.ties.shape(operation.x), c.ties.shape(node)
    if not isinstance(x, tuple) or 0 in before:
        return None
    result: list[FloatArray | None] = [None] * len(after)
    for old, new in matched_dims(before, after):
        wide_old, wide_new = [i for i in old if before[i] > 1], [i for i in new if after[i] > 1]
        known = [i for i in wide_old if x[i] is not None]
        if len(wide_new) == 1 and known:
            result[wide_new[0]] = _merged(x, wide_old, before)
        elif len(wide_old) == 1 and len(wide_new) > 1 and known:
            split: Any = x[known[0]]
            for axis, index in enumerate(wide_new):
                parts = np.moveaxis(split.reshape([after[i] for i in wide_new]), axis, 0).reshape(after[index], -1)
                result[index] = np.where((parts == parts[:, :1]).all(1), parts[:, 0], np.nan)
    return tuple(result)


def _merged(x: Slices, dims: list[int], shape: tuple[int, ...]) -> FloatArray:
    """An element of several dimensions is known where any of its indices is."""
    result = np.full([shape[i] for i in dims], np.nan)
    for i in dims:
        values = x[i]
        if values is not None:
            along = values.reshape([shape[i] if j == i else 1 for j in dims])
            result = np.where(np.isnan(result), along, result)
    return result.reshape(-1)


def permuted(c: KnownSlices, node: fx.Node, operation: Operation) -> Slices | None:
    """The constants of a tensor with its dimensions in another order."""
    x = c.slices.get(operation.x)
    order = permutation(node, len(x)) if isinstance(x, tuple) else None
    return None if order is None or not isinstance(x, tuple) else tuple(x[index] for index in order)


def split_parts(c: KnownSlices, node: fx.Node, operation: Operation) -> Any:
    """The constants of each part of a split tensor."""
    x, shapes = c.slices.get(operation.x), c.ties.shapes.get(node)
    dim = operation.options.get("dim", 0)
    if not isinstance(x, tuple) or not isinstance(shapes, list) or not isinstance(dim, int):
        return None
    parts, start = [], 0
    for size in part_sizes(shapes, dim):
        values = x[dim]
        part = None if values is None else values[start : start + size]
        parts.append(tuple(part if index == dim % len(x) else None for index in range(len(x))))
        start += size
    return parts


def indexed(c: KnownSlices, node: fx.Node, operation: Operation) -> Any:
    """The constants of what an index takes out of a tensor or a sequence."""
    x, index = c.slices.get(operation.x), node.args[1]
    if isinstance(x, list):
        return x[index] if isinstance(index, int) else None
    items = full_index(index, len(x)) if isinstance(x, tuple) else None
    if items is None or not isinstance(c.ties.shapes.get(operation.x), torch.Size):
        return None
    # A dimension that is taken in part, or gone, says nothing; along the others a part of a constant is that constant.
    dims = iter(x or ())
    result = []
    for item in items:
        values = None if item is None else next(dims)
        if item is None or isinstance(item, slice):
            result.append(values if item == slice(None) else None)
    return tuple(result)


def unbound(c: KnownSlices, node: fx.Node, operation: Operation) -> Any:
    """The constants of each slice of a tensor along one dimension."""
    x, shapes = c.slices.get(operation.x), c.ties.shapes.get(node)
    dim = operation.options.get("dim", 0)
    if not isinstance(x, tuple) or not isinstance(shapes, list) or not isinstance(dim, int):
        return None
    rest = tuple(values for index, values in enumerate(x) if index != dim % len(x))
    return [rest] * len(shapes)
