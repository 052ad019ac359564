"""Pointwise (1x1) convolutions with packed weights, computed from the active values alone: no dense weight is made.

    out[n, o] = bias[o] + sum of w[o, i] * x[n, i] over the active (o, i),

one vector operation over the pixels per active weight, so that a masked weight costs nothing; the gradients likewise
(`benchmarks/pointwise.py` compares with dense products). For 32 and 64 bit floats on the CPU where the native
kernels pack.
"""

from typing import Final

import torch
from torch import Tensor

from fedmef_fx.ops.sparse_matrix import SparseMatrix
from fedmef_fx.packing import backend
from fedmef_fx.packing.layout import has_no_values

__all__ = ["PackedMatrix", "is_faster"]

_DTYPES: Final = (torch.float32, torch.float64)
# A dense product is faster where more weights are active, and for images of fewer pixels in all of a batch.
_LARGEST_DENSITY: Final = 0.3
_FEWEST_PIXELS: Final = 64
# Images of fewer pixels are laid side by side: a loop over pixels needs some length.
_SHORT: Final = 65


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
        and backend().name == "native"
    )


class PackedMatrix:
    """The weight of a pointwise convolution, as a sparse matrix.

    Args:
        values: What to multiply by, [active].
        bitmap: Where they stand, uint8, in row-major order.
        shape: Of the dense weight, [out, in, 1, ...].
    """

    def __init__(self, values: Tensor, bitmap: Tensor, shape: torch.Size) -> None:
        self._matrix = SparseMatrix.of(values, bitmap, rows=shape[0], width=shape[1])

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x, [N, in, *size]: [N, out, *size]."""
        return _product(self._matrix, x, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the input, [N, in, *size], from that of the result, [N, out, *size]."""
        return _product(self._matrix.transposed(), grad, None)

    def weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""
        return self._matrix.inner_products(_pixels(grad), _pixels(x))


def _product(matrix: SparseMatrix, x: Tensor, bias: Tensor | None) -> Tensor:
    out = matrix.multiply(_pixels(x), bias)
    shape = (x.shape[0], matrix.rows, *x.shape[2:])
    if out.shape[0] == x.shape[0]:
        return out.view(shape)
    return out.view(matrix.rows, x.shape[0], -1).transpose(0, 1).contiguous().view(shape)


def _pixels(x: Tensor) -> Tensor:
    """[N, channels, pixels]; small images side by side, as [1, channels, N * pixels]."""
    flat = x.detach().contiguous().view(*x.shape[:2], -1)
    if flat.shape[0] == 1 or flat.shape[2] >= _SHORT:
        return flat
    return flat.transpose(0, 1).reshape(1, flat.shape[1], -1)
