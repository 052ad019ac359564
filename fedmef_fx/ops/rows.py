"""The rows of a weight - one per output channel - in dense and in packed storage, under one interface.

The equations of a normalised kernel are the same for both; they are written once, in terms of these operations.
A *column* holds one number per row and broadcasts against values by `spread`.

- `DenseRows`: values `[rows, fan_in]`, 0 where masked; columns `[rows, 1]`.
- `SegmentRows`: the active values only, `[active]`, row after row: the packed form of a weight whose first dimension
  counts its rows. Columns `[rows]`. Nothing as large as the dense weight is made.
- `IndexedRows`: the active values `[active]` in an order that mixes rows, as in a transposed convolution. Columns
  `[rows]`.
"""

import abc
import dataclasses
import functools
import weakref
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.packing.bitmap import count_rows, unpack_bits
from fedmef_fx.packing.tracers import is_traced

__all__ = ["DenseRows", "IndexedRows", "Rows", "SegmentRows", "packed_rows"]

_OF_NUMPY = (torch.float32, torch.float64)


class Rows(Protocol):
    """Values that are grouped into rows."""

    @property
    def fan_in(self) -> int:
        """Weights per row, masked ones included."""

    def counts(self, like: Tensor) -> Tensor:
        """Column: active weights per row, as floating point numbers of a tensor's type."""

    def active(self, values: Tensor) -> Tensor:
        """A copy of values with 0 where masked."""

    def clear_(self, values: Tensor) -> None:
        """Set masked values to 0, in place."""

    def minus_(self, values: Tensor, column: Tensor) -> Tensor:
        """Active values minus a column, 0 where masked; in place, except while it is traced."""

    def sum(self, values: Tensor) -> Tensor:
        """Column: sum of each row."""

    def square_norm(self, values: Tensor) -> Tensor:
        """Column: sum of squares of each row."""

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Column: inner product of each row."""

    def spread(self, column: Tensor) -> Tensor:
        """A column in a shape that broadcasts against values."""

    def column(self, vector: Tensor) -> Tensor:
        """A vector `[rows]` as a column."""


@dataclasses.dataclass(frozen=True, slots=True)
class DenseRows:
    """Rows of a dense weight.

    Attributes:
        mask: Boolean, `[rows, fan_in]`; None = all active.
        fan_in: Weights per row.
    """

    mask: Tensor | None
    fan_in: int

    def counts(self, like: Tensor) -> Tensor:
        """See `Rows.counts`."""
        if self.mask is None:
            return torch.full_like(like[:, :1], self.fan_in)
        return self.mask.sum(1, keepdim=True, dtype=like.dtype)

    def active(self, values: Tensor) -> Tensor:
        """See `Rows.active`; by choice and not by product: inf * 0 is nan."""
        return values.clone() if self.mask is None else torch.where(self.mask, values, 0.0)

    def clear_(self, values: Tensor) -> None:
        """See `Rows.clear_`."""
        if self.mask is not None:
            values.mul_(self.mask)

    def minus_(self, values: Tensor, column: Tensor) -> Tensor:
        """See `Rows.minus_`."""
        if is_traced():  # exporters lose track of what is changed in place
            return self.active(values - column)
        values.sub_(column)
        self.clear_(values)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """See `Rows.sum`."""
        return values.sum(1, keepdim=True)

    def square_norm(self, values: Tensor) -> Tensor:
        """See `Rows.square_norm`."""
        norm: Tensor = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        return norm.square()

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Rows.inner`."""
        return torch.einsum("of,of->o", left, right).unsqueeze(1)

    def spread(self, column: Tensor) -> Tensor:
        """See `Rows.spread`."""
        return column

    def column(self, vector: Tensor) -> Tensor:
        """See `Rows.column`."""
        return vector.unsqueeze(1)


class _PackedRows(abc.ABC):
    """What the packed forms share: there are no masked values to clear."""

    def active(self, values: Tensor) -> Tensor:
        """See `Rows.active`."""
        return values.clone()

    def clear_(self, values: Tensor) -> None:  # noqa: B027 -- nothing is masked: there is nothing to do
        """See `Rows.clear_`."""

    def minus_(self, values: Tensor, column: Tensor) -> Tensor:
        """See `Rows.minus_`; nobody traces packed rows."""
        return values.sub_(self.spread(column))

    @abc.abstractmethod
    def spread(self, column: Tensor) -> Tensor:
        """See `Rows.spread`."""

    @abc.abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """See `Rows.sum`."""

    def square_norm(self, values: Tensor) -> Tensor:
        """See `Rows.square_norm`."""
        return self.sum(values.square())

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Rows.inner`."""
        return self.sum(left * right)

    def column(self, vector: Tensor) -> Tensor:
        """See `Rows.column`."""
        return vector


@dataclasses.dataclass(frozen=True)
class SegmentRows(_PackedRows):
    """Rows of which each is one segment of the active values.

    Attributes:
        lengths: Active weights per row, int64 `[rows]`.
        fan_in: Weights per row.
    """

    lengths: Tensor
    fan_in: int

    @functools.cached_property
    def total(self) -> int:
        """Active weights of all rows."""
        return int(self.lengths.sum())

    @functools.cached_property
    def _segments(self) -> tuple[NDArray[np.intp], NDArray[np.bool_] | None]:
        """Where the rows that have values begin, and which these are; None for all."""
        lengths = self.lengths.numpy()
        full = None if lengths.all() else lengths > 0
        starts = np.zeros(lengths.size + 1, dtype=np.intp)
        np.cumsum(lengths, out=starts[1:])
        return (starts[:-1] if full is None else starts[:-1][full]), full

    def counts(self, like: Tensor) -> Tensor:
        """See `Rows.counts`."""
        return self.lengths.to(like.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """See `Rows.sum`."""
        if values.device.type != "cpu" or values.dtype not in _OF_NUMPY:
            result: Tensor = torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True, initial=0)
            return result
        # Seven times as fast as torch's, and more exact: numpy adds pairwise.
        starts, full = self._segments
        if full is None and starts.size:
            return torch.from_numpy(np.add.reduceat(values.detach().numpy(), starts))
        sums = values.new_zeros(self.lengths.numel())
        if starts.size:
            sums.numpy()[full] = np.add.reduceat(values.detach().numpy(), starts)
        return sums

    def spread(self, column: Tensor) -> Tensor:
        """See `Rows.spread`; a new tensor `[active]`."""
        if column.device.type != "cpu" or column.dtype not in _OF_NUMPY:
            return torch.repeat_interleave(column, self.lengths)
        return torch.from_numpy(np.repeat(column.detach().numpy(), self.lengths.numpy()))


@dataclasses.dataclass(frozen=True, slots=True)
class IndexedRows(_PackedRows):
    """Rows whose active values are scattered.

    Attributes:
        index: The row of each active value, int32 `[active]`.
        rows: Number of rows.
        fan_in: Weights per row.
    """

    index: Tensor
    rows: int
    fan_in: int

    def counts(self, like: Tensor) -> Tensor:
        """See `Rows.counts`."""
        return torch.bincount(self.index, minlength=self.rows).to(like.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """See `Rows.sum`."""
        return values.new_zeros(self.rows).index_add_(0, self.index, values)

    def spread(self, column: Tensor) -> Tensor:
        """See `Rows.spread`; a new tensor `[active]`."""
        return column.index_select(0, self.index)


def packed_rows(bitmap: Tensor, shape: torch.Size, *, axis: int = 0, groups: int = 1) -> SegmentRows | IndexedRows:
    """The rows of a packed weight.

    Args:
        bitmap: Where the dense weight is active, in row-major order.
        shape: Of the dense weight.
        axis: The dimension that counts rows, 0 or 1.
        groups: With axis 1: the first dimension falls into so many groups that have rows of their own, as in a grouped
            transposed convolution.
    """
    numel = shape.numel()
    if axis == 0:
        return _segments_of(bitmap, shape)
    rows, inner = groups * shape[1], torch.Size(shape[2:]).numel()
    positions = unpack_bits(bitmap, numel).nonzero().squeeze(1)
    per_group = max(numel // max(groups, 1), 1)
    index: Any = positions // per_group * shape[1] + positions // inner % shape[1]
    return IndexedRows(index.int(), rows, numel // max(rows, 1))


_Known = tuple["weakref.ref[Tensor]", int, SegmentRows]
_KNOWN: dict[int, _Known] = {}
"""By identity of a bitmap: the bitmap, its version, and its rows, which change with the topology only."""


def _segments_of(bitmap: Tensor, shape: torch.Size) -> SegmentRows:
    """The rows of a packed weight whose first dimension counts them; known until the bitmap changes."""
    rows, fan_in = shape[0], shape[1:].numel()
    if bitmap.is_inference():  # has no version
        return SegmentRows(count_rows(bitmap, rows, fan_in), fan_in)
    remembered = _KNOWN.get(id(bitmap))
    if (
        remembered is not None
        and remembered[0]() is bitmap
        and remembered[1] == bitmap._version
        and remembered[2].fan_in == fan_in
    ):
        return remembered[2]
    segments = SegmentRows(count_rows(bitmap, rows, fan_in), fan_in)
    key = id(bitmap)
    _KNOWN[key] = (weakref.ref(bitmap, lambda _: _KNOWN.pop(key, None)), bitmap._version, segments)
    return segments
