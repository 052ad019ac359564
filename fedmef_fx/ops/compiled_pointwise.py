"""Products of a sparse matrix, as starts of rows, columns and values, with dense ones; compiled by numba.

Importing this module imports numba. Inner loops run over pixels, which are consecutive in memory; tiles of them stay in
the first-level cache while all rows pass.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.packing.backend_numba import aligned_bytes, compiled, lowest_bit

__all__ = ["inner_products", "matrix_of", "multiply", "transposed"]

Floats = NDArray[np.floating[Any]]
Starts = NDArray[np.int64]
Columns = NDArray[np.int32]

_TILE: Final = 512  # pixels


def matrix_of(bitmap: Tensor, width: int, starts: Starts, columns: Columns) -> None:
    """Where the marked elements of a matrix `[starts.size - 1, width]` stand: starts of rows, and columns.

    Everything that indexes memory later is made here, from the bitmap alone, and lies within the matrix.
    """
    _matrix_of(aligned_bytes(bitmap), width, starts, columns)


@compiled()
def _matrix_of(bitmap: NDArray[np.uint8], width: int, starts: Starts, columns: Columns) -> None:
    words = bitmap[: bitmap.size // 8 * 8].view(np.uint64)
    size = (starts.size - 1) * width
    starts[0] = 0
    row = 0
    count = 0
    for i in range(words.size + bitmap.size % 8):
        is_word = i < words.size
        rest = words[i] if is_word else np.uint64(bitmap[words.size * 7 + i])
        begin = i * 64 if is_word else words.size * 56 + i * 8
        while rest:
            position = begin + np.int64(lowest_bit(rest))
            if position >= size:  # padding
                break
            while position >= (row + 1) * width:
                row += 1
                starts[row] = count
            columns[count] = position - row * width
            count += 1
            rest &= rest - np.uint64(1)
    starts[row + 1 :] = count


@compiled()
def transposed(
    starts: Starts, columns: Columns, values: Floats, out_starts: Starts, out_columns: Columns, out_values: Floats
) -> None:
    """The same matrix by columns; `out_starts` has one element more than there are columns."""
    out_starts[:] = 0
    for k in range(columns.size):
        out_starts[columns[k] + 1] += 1
    for i in range(1, out_starts.size):
        out_starts[i] += out_starts[i - 1]
    place = out_starts[:-1].copy()
    for row in range(starts.size - 1):
        for k in range(starts[row], starts[row + 1]):
            at = place[columns[k]]
            place[columns[k]] = at + 1
            out_columns[at] = row
            out_values[at] = values[k]


@compiled(reassociate=True)
def multiply(
    starts: Starts, columns: Columns, values: Floats, bias: Floats, x: Floats, out: Floats, first: int, last: int
) -> None:
    """Rows `first` to `last` of `out[n] = matrix @ x[n] + bias`: x `[N, in, pixels]`, out `[N, rows, pixels]`."""
    for n in range(x.shape[0]):
        for begin in range(0, x.shape[2], _TILE):
            end = min(begin + _TILE, x.shape[2])
            for row in range(first, last):
                target = out[n, row, begin:end]
                target[:] = bias[row]
                k = starts[row]
                # four at a time: a target is loaded and stored once for all of them
                while k + 4 <= starts[row + 1]:
                    w0, w1, w2, w3 = values[k], values[k + 1], values[k + 2], values[k + 3]
                    x0 = x[n, columns[k], begin:end]
                    x1 = x[n, columns[k + 1], begin:end]
                    x2 = x[n, columns[k + 2], begin:end]
                    x3 = x[n, columns[k + 3], begin:end]
                    for p in range(target.size):
                        target[p] += w0 * x0[p] + w1 * x1[p] + w2 * x2[p] + w3 * x3[p]
                    k += 4
                while k < starts[row + 1]:
                    w0 = values[k]
                    x0 = x[n, columns[k], begin:end]
                    for p in range(target.size):
                        target[p] += w0 * x0[p]
                    k += 1


@compiled(reassociate=True)
def inner_products(
    starts: Starts, columns: Columns, left: Floats, right: Floats, out: Floats, first: int, last: int
) -> None:
    """For each element of rows `first` to `last`: the sum over n and pixels of `left[n, row] * right[n, column]`."""
    out[starts[first] : starts[last]] = 0
    for n in range(left.shape[0]):
        for row in range(first, last):
            of_row = left[n, row]
            for k in range(starts[row], starts[row + 1]):
                of_column = right[n, columns[k]]
                total = out[k]
                for p in range(of_row.size):
                    total += of_row[p] * of_column[p]
                out[k] = total
