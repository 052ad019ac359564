"""Which layers multiply by their active weights alone: convolutions of one group and linear layers, where it is faster.

Depthwise convolutions have kernels of their own (`ops/depthwise.py`), which are always taken for packed weights.

The estimate counts in multiplications of a large dense product; it was fitted to `benchmarks/sparse_layers.py` on one
thread of a processor with AVX-512, where such a multiplication takes 15 ps:

    sparse = active * (3 * places + 500) + 35 * laid_out
    dense  = weights * results * min(1 + 4300 / (in * out), 2.5)

places and results are elements of a channel of the result, with and without the zeros between images; laid_out counts
the elements that are copied to other places and back. Narrow layers keep a dense product from its full speed. Where the
copies would take more memory than the dense weight does, and more than a 16th of the input, the dense product is taken.
"""

import functools
from collections.abc import Callable
from typing import Final, Protocol

import torch
from torch import Tensor

from fedmef_fx.ops.depthwise import PackedDepthwise, depthwise_plan
from fedmef_fx.ops.pointwise import PackedMatrix, has_long_rows
from fedmef_fx.ops.sparse_convolution import Geometry, PackedConvolution, room_for_copies, row_layout
from fedmef_fx.ops.sparse_linear import PackedLinear
from fedmef_fx.packing import backend
from fedmef_fx.packing.sample_parts import KeptSamples

__all__ = ["MakeWay", "SparseWay", "convolution_way", "depthwise_way", "linear_way"]

_DTYPES: Final = (torch.float32, torch.float64)
_PER_PLACE: Final = 3.0
_PER_WEIGHT: Final = 500.0
_PER_COPY: Final = 35.0
_NARROW: Final = 4300.0
_SLOWEST_DENSE: Final = 2.5
# Fewer results per channel leave vectors empty.
_FEWEST_RESULTS: Final = 16


class SparseWay(Protocol):
    """A layer's weight as active values that need no dense form."""

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """The layer's result; with `inplace` it may be written over x, which then has its shape."""

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """Gradient of an input of some shape, from that of the result; `inplace` as of `forward`."""

    def weight_gradient(self, grad: Tensor, x: Tensor | KeptSamples) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""


MakeWay = Callable[[Tensor, Tensor], SparseWay]
"""From the active values and their bitmap."""


def convolution_way(x: Tensor, active: int, shape: torch.Size, geometry: Geometry) -> MakeWay | None:
    """How a convolution of one group computes from its active weights; None where a dense product is faster.

    Inputs that do not fit the weight are left to torch, which has an error for them.

    Args:
        x: The input, [N, in, *size].
        active: Active weights.
        shape: Of the dense weight, [out, in, *kernel].
        geometry: Of the convolution, of as many dimensions as its kernel has.
    """
    if not (_is_possible(x) and x.dim() == len(shape) and x.shape[1] == shape[1] and x.numel() and shape.numel()):
        return None
    if all(size == 1 for size in (*geometry.stride, *shape[2:])) and not any(geometry.padding):
        results = x.numel() // x.shape[1]
        copies = 0 if has_long_rows(x) else (shape[0] + shape[1]) * results
        is_faster = _is_faster(active, shape, results=results, places=results, copies=copies)
        return functools.partial(PackedMatrix, shape=shape) if is_faster else None
    if len(shape) != 4:
        return None
    axes = zip(x.shape[2:], shape[2:], geometry.padding, geometry.dilation, strict=True)
    if any(size + 2 * padding <= dilation * (kernel - 1) for size, kernel, padding, dilation in axes):
        return None
    layout = row_layout(shape, x.shape[2:], geometry)
    if layout.image_size(shape) > room_for_copies(shape, x.shape):
        return None
    places = layout.size * x.shape[0]
    is_faster = _is_faster(
        active,
        shape,
        results=layout.out_size[0] * layout.out_size[1] * x.shape[0],
        places=places,
        copies=layout.image_size(shape) * x.shape[0],
    )
    return functools.partial(PackedConvolution, shape=shape, geometry=geometry) if is_faster else None


def depthwise_way(x: Tensor, shape: torch.Size, geometry: Geometry) -> MakeWay | None:
    """The same for a two-dimensional depthwise convolution, whatever share of it is active.

    Args:
        x: The input, [N, channels, height, width].
        shape: Of the dense weight, [channels, 1, height, width].
        geometry: Of the convolution.
    """
    is_fitting = len(shape) == 4 and x.dim() == 4 and x.shape[1] == shape[0] and shape[1] == 1
    if not (is_fitting and _is_possible(x) and x.numel() and shape.numel()):
        return None
    plan = depthwise_plan(shape, x.shape[2:], geometry)
    if plan is None or max(plan.scratch, plan.back_scratch) > room_for_copies(shape, x.shape):
        return None
    return functools.partial(PackedDepthwise, shape=shape, geometry=geometry)


def linear_way(x: Tensor, active: int, shape: torch.Size) -> MakeWay | None:
    """The same for a linear layer with an input [..., in] and a dense weight [out, in]."""
    if not (_is_possible(x) and x.dim() and x.shape[-1] == shape[1] and shape.numel()):
        return None
    results = x.numel() // shape[1]
    if sum(shape) * results > room_for_copies(shape, x.shape):
        return None
    is_faster = _is_faster(active, shape, results=results, places=results, copies=sum(shape) * results)
    return functools.partial(PackedLinear, shape=shape) if is_faster else None


def _is_possible(x: Tensor) -> bool:
    is_plain = x.device.type == "cpu" and x.dtype in _DTYPES and x.is_contiguous()
    return is_plain and backend().name == "native"


def _is_faster(active: int, shape: torch.Size, *, results: int, places: int, copies: int) -> bool:
    if results < _FEWEST_RESULTS:
        return False
    sparse = active * (_PER_PLACE * places + _PER_WEIGHT) + _PER_COPY * copies
    dense = shape.numel() * results * min(1 + _NARROW / (shape[0] * shape[1]), _SLOWEST_DENSE)
    return sparse < dense
