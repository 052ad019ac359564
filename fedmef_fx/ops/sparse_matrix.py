"""A sparse matrix by its rows, and its products with many dense columns at once, in C.

Columns are dense tensors `[runs, columns, length]`: `length` elements that lie side by side in memory, for every column
of the matrix, and that `runs` times. Sums have an order of their own, whatever the number of threads.
"""

import dataclasses

import torch
from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.packing.backend_native import FORMATS
from fedmef_fx.packing.backend_numpy import check_count
from fedmef_fx.packing.bitmap import check_bitmap

__all__ = ["SparseMatrix"]

_MOST_ELEMENTS = torch.iinfo(torch.int32).max


@dataclasses.dataclass(frozen=True, slots=True)
class SparseMatrix:
    """A matrix `[rows, width]`, of which only the active values are stored.

    Attributes:
        starts: Where each row begins among the values, and where the last one ends: int64 [rows + 1].
        columns: int32 [active].
        values: [active], float32 or float64.
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
        check_count(bitmap, values)
        starts = torch.empty(rows + 1, dtype=torch.int64)
        columns = torch.empty(values.numel(), dtype=torch.int32)
        call("sparse_matrix", bitmap, rows, width, starts, columns)
        return cls(starts, columns, values.contiguous(), width)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.starts.numel() - 1

    def transposed(self) -> "SparseMatrix":
        """The same matrix by its columns."""
        made = SparseMatrix(
            torch.empty(self.width + 1, dtype=torch.int64),
            torch.empty_like(self.columns),
            torch.empty_like(self.values),
            self.rows,
        )
        call(
            "sparse_transpose",
            self.values.dtype.itemsize,
            self.starts,
            self.columns,
            self.values,
            None,
            None,
            1,
            self.rows,
            made.rows,
            made.starts,
            made.columns,
            made.values,
        )
        return made

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with `x` `[runs, width, length]`, and a bias of each row: `[runs, rows, length]`."""
        runs, _, length = self._checked(x, self.width).shape
        out = x.new_empty(runs, self.rows, length)
        added = None if bias is None else self._bias(bias)
        call(
            "sparse_product",
            FORMATS[x.dtype],
            self.starts,
            self._offsets(length),
            self.values,
            added,
            x,
            x.stride(0),
            out,
            out.stride(0),
            length,
            self.rows,
            runs,
            length,
            self._threads(runs * length),
        )
        return out

    def inner_products(self, left: Tensor, right: Tensor) -> Tensor:
        """For each active element, the sum over runs and elements of `left[:, row] * right[:, column]`, [active].

        Args:
            left: [runs, rows, length].
            right: [runs, width, length].
        """
        runs, _, length = self._checked(left, self.rows).shape
        if self._checked(right, self.width).shape[::2] != left.shape[::2]:
            raise ValueError(f"sparse matrix: got {list(right.shape)}; expected {[runs, self.width, length]}")
        out = torch.empty_like(self.values)
        call(
            "sparse_inner",
            FORMATS[left.dtype],
            self.starts,
            self._offsets(length),
            left,
            left.stride(0),
            length,
            right,
            right.stride(0),
            out,
            self.rows,
            runs,
            length,
            self._threads(runs * length),
        )
        return out

    def _checked(self, x: Tensor, columns: int) -> Tensor:
        """What the kernels may read.

        Raises:
            ValueError: Another shape or dtype, or more elements than an offset can count.
        """
        if x.dim() != 3 or x.shape[1] != columns or x.dtype != self.values.dtype:
            expected = f"{self.values.dtype}[runs, {columns}, length]"
            raise ValueError(f"sparse matrix: got {x.dtype}{list(x.shape)}; expected {expected}")
        if columns * x.shape[2] > _MOST_ELEMENTS:
            raise ValueError(f"sparse matrix: got {list(x.shape)}; expected at most {_MOST_ELEMENTS} elements per run")
        return x

    def _bias(self, bias: Tensor) -> Tensor:
        if bias.shape != (self.rows,):
            raise ValueError(f"sparse matrix: got a bias {list(bias.shape)}; expected {[self.rows]}")
        return bias.detach().to(self.values.dtype).contiguous()

    def _offsets(self, length: int) -> Tensor:
        return self.columns * length

    def _threads(self, length: int) -> int:
        return threads_for(self.values.numel() * length // 8)
