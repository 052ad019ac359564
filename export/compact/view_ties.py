"""How operations that move indices move channels: reshape, permute, expand, parts, indexing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from fedmef_fx.export.compact.ties import Dims, IntArray, State, Ties
from fedmef_fx.graph.operations import Operation

__all__ = [
    "expanded",
    "full_index",
    "indexed",
    "matched_dims",
    "part_sizes",
    "permutation",
    "permuted",
    "reshaped",
    "split_part",
    "unbound",
]


def matched_dims(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[range, range]]:
    """The dimensions of a reshape that go together: the shortest runs with the same number of elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                break
        yield range(start_i, i), range(start_j, j)


def reshaped(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Channels after a reshape."""
    before, after = ties.shape(operation.x), ties.shape(node)
    x = ties.of(operation.x)
    if 0 in before or not before or "unflattened_size" in operation.options:  # a size that a module holds
        return None
    result: list[IntArray | None] = [None] * len(after)
    for old, new in matched_dims(before, after):
        _match(ties, x, list(old), list(new), result, before=before, after=after)
    return tuple(result)


def _match(
    ties: Ties,
    x: Dims,
    old: list[int],
    new: list[int],
    result: list[IntArray | None],
    *,
    before: tuple[int, ...],
    after: tuple[int, ...],
) -> None:
    wide_old = [index for index in old if before[index] > 1]
    wide_new = [index for index in new if after[index] > 1]
    cut = [index for index in wide_old if x[index] is not None]
    if not cut:
        return
    if len(wide_old) == 1 and len(wide_new) == 1:
        result[wide_new[0]] = x[wide_old[0]]
    elif len(wide_new) == 1 and len(cut) == 1:  # merged: each channel becomes a block of features
        shape = [before[index] if index == cut[0] else 1 for index in wide_old]
        channels: Any = x[cut[0]]
        merged = np.broadcast_to(channels.reshape(shape), [before[index] for index in wide_old])
        result[wide_new[0]] = merged.reshape(-1).copy()
    elif len(wide_old) == 1 and len(wide_new) > 1:  # split: entries of one new dimension leave whole
        chosen = wide_new[-2]
        channels = x[wide_old[0]]
        parts = np.moveaxis(channels.reshape([after[index] for index in wide_new]), len(wide_new) - 2, 0)
        parts = parts.reshape(after[chosen], -1)
        for part in parts:
            ties.block(part)
        result[chosen] = parts[:, 0].copy()
    else:
        for index in cut:
            ties.anchor(x[index], f"a reshape of {list(before)} to {list(after)} mixes several of its dimensions")


def permutation(node: fx.Node, rank: int) -> list[int] | None:
    """Which dimension each dimension of the result was; None where that is not written in the graph."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    order = list(range(rank))
    if name == "t":
        return order[::-1]
    rest: list[Any] = [*node.args[1:], *node.kwargs.values()]
    dims: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if not all(isinstance(dim, int) for dim in dims):
        return None
    wanted = [dim % rank for dim in dims]
    if name == "transpose":
        first, second = wanted
        order[first], order[second] = second, first
        return order
    return wanted


def permuted(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Channels after transpose and permute."""
    x = ties.of(operation.x)
    order = permutation(node, len(x))
    return None if order is None else tuple(x[index] for index in order)


def expanded(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Channels after an expand: new dimensions are never cut."""
    x, before, after = ties.of(operation.x), ties.shape(operation.x), ties.shape(node)
    offset = len(after) - len(before)
    return (
        *(None,) * offset,
        *(x[index] if before[index] == after[index + offset] else None for index in range(len(before))),
    )


def part_sizes(shapes: Any, dim: int) -> list[int]:
    """The sizes of the parts of a split."""
    return [int(shape[dim]) for shape in shapes]


def split_part(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Channels of the parts of `split` and `chunk`."""
    x, shapes, dim = ties.of(operation.x), ties.shapes.get(node), operation.options.get("dim", 0)
    if not isinstance(shapes, list) or not isinstance(dim, int) or not x:
        return None
    dim %= len(x)
    parts: list[Any] = []
    start = 0
    for size in part_sizes(shapes, dim):
        cut = x[dim]
        part = None if cut is None else cut[start : start + size]
        parts.append(tuple(part if index == dim else channels for index, channels in enumerate(x)))
        start += size
    return parts


def unbound(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Channels of what `unbind` gives."""
    x, shapes, dim = ties.of(operation.x), ties.shapes.get(node), operation.options.get("dim", 0)
    if not isinstance(shapes, list) or not isinstance(dim, int) or not x:
        return None
    ties.anchor(x[dim], f"{node.name} takes its entries apart")
    rest = tuple(channels for index, channels in enumerate(x) if index != dim % len(x))
    return [rest] * len(shapes)


def indexed(ties: Ties, node: fx.Node, operation: Operation) -> State | None:
    """Channels after `x[...]`: of a tuple a part; of a tensor slices, new and dropped dimensions."""
    state, index = ties.dims.get(operation.x, ()), node.args[1]
    if isinstance(state, list):
        part = state[index] if isinstance(index, int) else None
        return part if isinstance(part, list | tuple) else None
    if not isinstance(ties.shapes.get(operation.x), torch.Size):
        return ()  # an entry of a size
    items = full_index(index, len(state))
    return None if items is None else _sliced(ties, node, state, items)


def full_index(index: Any, rank: int) -> list[Any] | None:
    """An index with one entry per dimension, besides None for new ones; None where it holds more than numbers."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is Ellipsis or isinstance(item, int | slice) for item in items):
        return None
    named = sum(item is not None and item is not Ellipsis for item in items)
    at = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
    return [*items[:at], *[slice(None)] * (rank - named), *items[at + 1 :]]


def _sliced(ties: Ties, node: fx.Node, x: Dims, items: list[Any]) -> State:
    result: list[IntArray | None] = []
    position = 0
    for item in items:
        if item is None:
            result.append(None)
            continue
        channels = x[position]
        if item == slice(None):
            result.append(channels)
        else:
            # The numbers in the index would have to change; entries of one dimension keep their places instead.
            ties.anchor(channels, f"{node.name} takes a part of it by its place")
            if isinstance(item, slice):
                result.append(None if channels is None else _part(channels, item))
        position += 1
    return tuple(result)


def _part(channels: IntArray, item: slice) -> IntArray | None:
    bounds = (item.start, item.stop, item.step)
    if any(bound is not None and not isinstance(bound, int) for bound in bounds):
        return None
    return channels[item]
