"""A sparse matrix by its rows, and its products with dense rows, in C.

The dense rows that it multiplies lie in one run of memory, each at an offset of its own, and may overlap: that is how a
convolution is such a product, too (`ops/sparse_convolution.py`). Sums have an order of their own, whatever the number
of threads.
"""

import dataclasses
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.packing.backend_native import FORMATS
from fedmef_fx.packing.bitmap import check_bitmap
from fedmef_fx.packing.layout import has_no_values

__all__ = ["Rows", "SparseMatrix", "SparseRows"]

_MOST_ELEMENTS: Final = torch.iinfo(torch.int32).max


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Dense rows within a buffer, several runs of them.

    Attributes:
        buffer: `[n]`, contiguous.
        count: Rows per run.
        distance: From the start of a row to that of the next one, in elements.
        length: Elements of a row that are looked at.
        runs: Number of runs.
        run_distance: From the start of a run to that of the next one.
        first: Where the first row begins in the buffer.
        reach: How far before or after its row an offset may lead.
    """

    buffer: Tensor
    count: int
    distance: int
    length: int
    runs: int = 1
    run_distance: int = 0
    first: int = 0
    reach: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        last = self.first + (self.runs - 1) * self.run_distance + (self.count - 1) * self.distance + self.length
        end = self.buffer.numel()
        if self.count and self.runs and (self.first < self.reach[0] or last + self.reach[1] > end):
            raise ValueError(f"rows: got {end} elements; expected {last + self.reach[1]}, {self.reach[0]} in front")
        if end > _MOST_ELEMENTS:
            raise ValueError(f"rows: got {end} elements; expected at most {_MOST_ELEMENTS}")

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        """Of a tensor `[runs, rows, length]`."""
        runs, count, length = x.shape
        return cls(x.contiguous().view(-1), count, length, length, runs=runs, run_distance=count * length)

    @property
    def start(self) -> Tensor:
        """The buffer from the first row on."""
        return self.buffer[self.first :]


@dataclasses.dataclass(frozen=True, slots=True)
class SparseRows:
    """The rows of a sparse matrix, with offsets of the dense rows that its values multiply.

    Attributes:
        starts: Where each row begins among the values, and where the last one ends: int64 [rows + 1].
        offsets: int32 [active].
        values: [active], float32 or float64.
        inputs: How many dense rows the offsets lead to.
    """

    starts: Tensor
    offsets: Tensor
    values: Tensor
    inputs: int

    def multiply(self, x: Rows, out: Rows, bias: Tensor | None = None) -> None:
        """Write the product with the rows of `x`, plus a bias of each row, to those of `out`."""
        rows = self._checked(out)
        self._checked_length(x, out)
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"sparse matrix: got a bias {list(bias.shape)}; expected {[rows]}")
        bias = None if bias is None else bias.detach().to(self.values.dtype).contiguous()
        call(
            "sparse_product",
            FORMATS[self.values.dtype],
            self.starts,
            self.offsets,
            self.values,
            bias,
            x.start,
            x.run_distance,
            out.start,
            out.run_distance,
            out.distance,
            rows,
            out.runs,
            out.length,
            self._threads(out),
        )

    def add_inner_products(self, left: Rows, x: Rows, out: Tensor) -> None:
        """Add to `out` `[active]`, for each value, the inner product of its row of `left` and of the row of `x`."""
        rows = self._checked(left)
        self._checked_length(x, left)
        if out.shape != self.values.shape or out.dtype != self.values.dtype:
            raise ValueError(f"sparse matrix: got {out.dtype}{list(out.shape)}; expected {list(self.values.shape)}")
        call(
            "sparse_inner",
            FORMATS[self.values.dtype],
            self.starts,
            self.offsets,
            left.start,
            left.run_distance,
            left.distance,
            x.start,
            x.run_distance,
            out,
            rows,
            left.runs,
            left.length,
            self._threads(left),
        )

    def _checked(self, dense: Rows) -> int:
        rows = self.starts.numel() - 1
        if dense.count != rows:
            raise ValueError(f"sparse matrix: got {dense.count} dense rows; expected {rows}")
        return rows

    def _checked_length(self, x: Rows, other: Rows) -> None:
        if x.count != self.inputs:
            raise ValueError(f"sparse matrix: got {x.count} inputs; expected {self.inputs}")
        if (x.runs, x.length) != (other.runs, other.length):
            raise ValueError(f"sparse matrix: got rows {x.runs, x.length}; expected {other.runs, other.length}")
        for dense in (x, other):
            if dense.buffer.dtype != self.values.dtype:
                raise ValueError(f"sparse matrix: got {dense.buffer.dtype}; expected {self.values.dtype}")

    def _threads(self, dense: Rows) -> int:
        return threads_for(self.values.numel() * dense.runs * dense.length // 8)


@dataclasses.dataclass(frozen=True, slots=True)
class SparseMatrix:
    """A matrix `[rows, width]`, of which only the active values are stored.

    Attributes:
        starts: As in `SparseRows`.
        columns: int32 [active].
        values: [active].
        width: Number of columns.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, values: Tensor, bitmap: Tensor, *, rows: int, width: int) -> "SparseMatrix":
        """From the active values, and a bitmap of where they stand in row-major order.

        Everything that indexes memory later is made here, from the bitmap alone, and lies within the matrix.

        Raises:
            ConfigError: The bitmap is not one of the matrix.
            ValueError: As many values as set bits are needed.
        """
        check_bitmap(bitmap, rows * width)
        if not has_no_values(values):
            _check_count(bitmap, values)
        starts = values.new_empty(rows + 1, dtype=torch.int64, requires_grad=False)
        columns = values.new_empty(values.numel(), dtype=torch.int32, requires_grad=False)
        call("sparse_matrix", bitmap, rows, width, starts, columns)
        return cls(starts, columns, values.detach().contiguous(), width)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.starts.numel() - 1

    def by_rows(self, distance: int) -> SparseRows:
        """Its rows, for dense rows of that distance, one for each column."""
        return SparseRows(self.starts, self.columns * distance, self.values, self.width)

    def placed(self, places: Tensor, inputs: int) -> SparseRows:
        """Its rows, where the dense row of each column begins at a place of its own, int32 [width], within so many."""
        if places.shape != (self.width,):
            raise ValueError(f"sparse matrix: got {list(places.shape)} places; expected {[self.width]}")
        return SparseRows(self.starts, places.index_select(0, self.columns), self.values, inputs)

    def by_columns(
        self, rows: int, distance: int, target: Tensor | None = None, shift: Tensor | None = None
    ) -> SparseRows:
        """The transposed matrix, of which several columns may make one row.

        Args:
            rows: Of the result.
            distance: Between the dense rows that it multiplies, one for each row of this matrix.
            target: The row of the result that each column goes to, int32 [width]; None for one each.
            shift: How far before the dense row the one of a column begins, int32 [width]; None for 0.
        """
        if target is None and rows != self.width:
            raise ValueError(f"sparse matrix: got {rows} rows; expected one per column, that is {self.width}")
        if any(table is not None and table.shape != (self.width,) for table in (target, shift)):
            raise ValueError(f"sparse matrix: got tables {target}, {shift}; expected {self.width} elements")
        rows_of_weight = SparseRows(
            self.starts.new_empty(rows + 1), torch.empty_like(self.columns), torch.empty_like(self.values), self.rows
        )
        call(
            "sparse_transpose",
            self.values.dtype.itemsize,
            self.starts,
            self.columns,
            self.values,
            target,
            shift,
            distance,
            self.rows,
            rows,
            rows_of_weight.starts,
            rows_of_weight.offsets,
            rows_of_weight.values,
        )
        return rows_of_weight


def _check_count(bitmap: Tensor, values: Tensor) -> None:
    marked = call("count", bitmap, 8 * bitmap.numel())  # bits after the last element as well: they have to be 0
    if values.numel() != marked:
        raise ValueError(f"sparse matrix: got {values.numel()} values; expected one per set bit, that is {marked}")
