"""Linear layers by their active weights alone: the transposed input has all samples of a feature side by side."""

import torch
from torch import Tensor

from fedmef_fx.ops.sparse_matrix import Rows, SparseMatrix
from fedmef_fx.packing.sample_parts import KeptSamples

__all__ = ["PackedLinear"]

# Samples are filled up with zeros to whole vectors.
_VECTOR = 16


class PackedLinear:
    """The weight of a linear layer, as a sparse matrix.

    Args:
        values: What to multiply by, [active].
        bitmap: Where they stand, uint8, in row-major order.
        shape: Of the dense weight, [out, in].
    """

    def __init__(self, values: Tensor, bitmap: Tensor, shape: torch.Size) -> None:
        self._matrix = SparseMatrix.of(values, bitmap, rows=shape[0], width=shape[1])

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """The layer's result, [..., out], for x, [..., in]."""
        del inplace  # the result has another shape in general
        rows = _by_feature(x)
        out = rows.buffer.new_empty(self._matrix.rows, rows.length)
        self._matrix.by_rows(rows.distance).multiply(rows, Rows.of(out.unsqueeze(0)), bias)
        return _by_sample(out, x.shape)

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """Gradient of the input, [..., in], from that of the result, [..., out]."""
        del inplace
        rows = _by_feature(grad)
        out = rows.buffer.new_empty(x_shape[-1], rows.length)
        self._matrix.by_columns(x_shape[-1], rows.distance).multiply(rows, Rows.of(out.unsqueeze(0)))
        return _by_sample(out, x_shape)

    def weight_gradient(self, grad: Tensor, x: Tensor | KeptSamples) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""
        x = x.whole() if isinstance(x, KeptSamples) else x
        left, right = _by_feature(grad), _by_feature(x)
        out = torch.zeros_like(self._matrix.values)
        self._matrix.by_rows(right.distance).add_inner_products(left, right, out)
        return out


def _by_feature(x: Tensor) -> Rows:
    """`[..., features]` as a row per feature."""
    flat = x.detach().reshape(-1, x.shape[-1])
    samples = flat.shape[0]
    rows = flat.new_empty(flat.shape[1], -(-samples // _VECTOR) * _VECTOR)
    rows[:, :samples] = flat.t()
    rows[:, samples:] = 0
    return Rows.of(rows.unsqueeze(0))


def _by_sample(rows: Tensor, like: torch.Size) -> Tensor:
    """The inverse, in the shape of some input but for the number of features."""
    samples = like[:-1].numel()
    return rows[:, :samples].t().contiguous().view(*like[:-1], rows.shape[0])
