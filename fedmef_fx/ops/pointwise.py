"""Pointwise (1x1) convolutions with packed weights, computed from the active values alone: no dense weight is made.

    out[n, o] = bias[o] + sum of w[o, i] * x[n, i] over the active (o, i),

one vector operation over the pixels per active weight, so that a masked weight costs nothing; the gradients likewise
(`benchmarks/pointwise.py` compares with dense products). For 32 and 64 bit floats on the CPU where numba is what packs.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.packing import backend
from fedmef_fx.packing.backend_numpy import check_count
from fedmef_fx.packing.bitmap import check_bitmap
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.spans import run_parts

__all__ = ["PackedMatrix", "is_faster"]

_DTYPES: Final = (torch.float32, torch.float64)
# A dense product is faster where more weights are active, and for images of fewer pixels in all of a batch.
_LARGEST_DENSITY: Final = 0.3
_FEWEST_PIXELS: Final = 64
# Images of fewer pixels are laid side by side: a loop over pixels needs some length.
_SHORT: Final = 65
# Multiplications from which a second thread is worth its start.
_SMALLEST_PART: Final = 1 << 20


def is_faster(x: Tensor, active: int, shape: torch.Size) -> bool:
    """Whether `PackedMatrix` computes a pointwise convolution, rather than a dense product.

    Inputs that do not fit the weight are left to torch, which has an error for them.

    Args:
        x: The input, [N, in, *size].
        active: Active weights.
        shape: Of the dense weight, [out, in, 1, ...].
    """
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and not has_no_values(x)
        and x.is_contiguous()
        and x.dim() == len(shape)
        and x.shape[1] == shape[1]
        and active <= _LARGEST_DENSITY * shape.numel()
        and x.numel() >= _FEWEST_PIXELS * x.shape[1]
        and backend().name == "numba"
    )


class _Rows(NamedTuple):
    """A sparse matrix by rows.

    Attributes:
        starts: Where each row begins among the values, and where the last one ends: int64 [rows + 1].
        columns: int32 [active].
        values: [active].
    """

    starts: NDArray[np.int64]
    columns: Tensor
    values: Tensor


class PackedMatrix:
    """The weight of a pointwise convolution, as a sparse matrix.

    Args:
        values: What to multiply by, [active].
        bitmap: Where they stand, uint8, in row-major order.
        shape: Of the dense weight, [out, in, 1, ...].
    """

    def __init__(self, values: Tensor, bitmap: Tensor, shape: torch.Size) -> None:
        self._shape = shape
        check_bitmap(bitmap, shape.numel())
        check_count(bitmap, values)
        starts, columns = np.empty(shape[0] + 1, np.int64), torch.empty(values.numel(), dtype=torch.int32)
        _kernels().matrix_of(bitmap, shape[1], starts, columns.numpy())
        self._rows = _Rows(starts, columns, values)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x, [N, in, *size]: [N, out, *size]."""
        return _product(self._rows, x, self._shape[0], bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the input, [N, in, *size], from that of the result, [N, out, *size]."""
        _, columns, values = self._rows
        by_column = _Rows(np.empty(self._shape[1] + 1, np.int64), torch.empty_like(columns), torch.empty_like(values))
        _kernels().transposed(*_arrays(self._rows), *_arrays(by_column))
        return _product(by_column, grad, self._shape[1], None)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""
        starts, columns, values = self._rows
        result = torch.empty_like(values)
        arguments = (starts, columns.numpy(), *(_pixels(part).numpy() for part in (grad, x)), result.numpy())
        kernel = _kernels().inner_products
        run_parts(
            self._shape[0],
            lambda first, last: kernel(*arguments, first, last),
            most=_worthwhile_parts(values.numel(), x),
        )
        return result


def _product(matrix: _Rows, x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    pixels = _pixels(x)
    out = x.new_empty(pixels.shape[0], rows, pixels.shape[2])
    added = torch.zeros(rows, dtype=x.dtype) if bias is None else bias.detach().contiguous()
    arguments = (*_arrays(matrix), *(part.numpy() for part in (added, pixels, out)))
    kernel = _kernels().multiply
    run_parts(
        rows,
        lambda first, last: kernel(*arguments, first, last),
        most=_worthwhile_parts(matrix.values.numel(), x),
    )
    shape = (x.shape[0], rows, *x.shape[2:])
    if pixels.shape[0] == x.shape[0]:
        return out.view(shape)
    return out.view(rows, x.shape[0], -1).transpose(0, 1).contiguous().view(shape)


def _arrays(matrix: _Rows) -> tuple[NDArray[Any], ...]:
    return matrix.starts, matrix.columns.numpy(), matrix.values.numpy()


def _pixels(x: Tensor) -> Tensor:
    """[N, channels, pixels]; small images side by side, as [1, channels, N * pixels]."""
    flat = x.detach().contiguous().view(*x.shape[:2], -1)
    if flat.shape[0] == 1 or flat.shape[2] >= _SHORT:
        return flat
    return flat.transpose(0, 1).reshape(1, flat.shape[1], -1)


def _worthwhile_parts(active: int, x: Tensor) -> int:
    """On how many threads to run."""
    return max(1, active * (x.numel() // x.shape[1]) // _SMALLEST_PART)


@functools.cache
def _kernels() -> ModuleType:
    # Imported here: it imports numba.
    return importlib.import_module("fedmef_fx.ops.compiled_pointwise")
