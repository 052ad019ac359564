"""Pointwise (1x1) convolutions with packed weights, computed from the active values alone: no dense weight is made.

    out[n, o] = bias[o] + sum of w[o, i] * x[n, i] over the active (o, i),

one vector operation over the pixels per active weight, so that a masked weight costs nothing; the gradients likewise
(`benchmarks/sparse_layers.py` compares with dense products).
"""

from typing import Final

import torch
from torch import Tensor

from fedmef_fx.ops.sparse_matrix import Rows, SparseMatrix, SparseRows
from fedmef_fx.packing.sample_parts import KeptSamples, samples_of

__all__ = ["PackedMatrix", "has_long_rows"]

# Images of fewer pixels are laid side by side: a loop over pixels needs some length.
_SHORT: Final = 65


def has_long_rows(x: Tensor) -> bool:
    """Whether the images [N, in, *size] are products' rows as they lie."""
    return x.shape[0] == 1 or x.shape[2:].numel() >= _SHORT


class PackedMatrix:
    """The weight of a pointwise convolution, as a sparse matrix.

    Args:
        values: What to multiply by, [active].
        bitmap: Where they stand, uint8, in row-major order.
        shape: Of the dense weight, [out, in, 1, ...].
    """

    def __init__(self, values: Tensor, bitmap: Tensor, shape: torch.Size) -> None:
        self._matrix = SparseMatrix.of(values, bitmap, rows=shape[0], width=shape[1])

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """The convolution of x, [N, in, *size]: [N, out, *size]."""
        del inplace  # each product reads all channels
        pixels = _pixels(x)
        return _product(self._matrix.by_rows(pixels.shape[2]), self._matrix.rows, x, pixels, bias)

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """Gradient of the input, [N, in, *size], from that of the result, [N, out, *size]."""
        del inplace
        pixels = _pixels(grad)
        matrix = self._matrix.by_columns(x_shape[1], pixels.shape[2])
        return _product(matrix, x_shape[1], grad, pixels, None)

    def weight_gradient(self, grad: Tensor, x: Tensor | KeptSamples) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""
        out = torch.zeros_like(self._matrix.values)
        for part, some in samples_of(x):
            left, right = Rows.of(_pixels(grad[part])), Rows.of(_pixels(some))
            self._matrix.by_rows(right.distance).add_inner_products(left, right, out)
            del some, right  # or they would live until the next ones are there
        return out


def _product(matrix: SparseRows, rows: int, x: Tensor, pixels: Tensor, bias: Tensor | None) -> Tensor:
    out = x.new_empty(pixels.shape[0], rows, pixels.shape[2])
    matrix.multiply(Rows.of(pixels), Rows.of(out), bias)
    shape = (x.shape[0], rows, *x.shape[2:])
    if out.shape[0] == x.shape[0]:
        return out.view(shape)
    return out.view(rows, x.shape[0], -1).transpose(0, 1).contiguous().view(shape)


def _pixels(x: Tensor) -> Tensor:
    """[N, channels, pixels]; small images side by side, as [1, channels, N * pixels]."""
    flat = x.detach().contiguous().view(*x.shape[:2], -1)
    if has_long_rows(x):
        return flat
    return flat.transpose(0, 1).reshape(1, flat.shape[1], -1)
