"""Depthwise convolutions of two dimensions, each channel with one kernel of its own, with packed weights.

oneDNN lays out in another order all that it gets and gives, which takes longer than the few products of a depthwise
kernel. Here each plane is worked on where it lies, from a copy in the first-level cache, so that a result may be
written over its input whole. The weight is made dense: it is small, and next to nothing of it is masked.
"""

import dataclasses
import functools
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.ops.packed_weight import gather, unpack
from fedmef_fx.ops.sparse_convolution import Geometry
from fedmef_fx.packing.backend_native import FORMATS
from fedmef_fx.packing.sample_parts import KeptSamples, samples_of

__all__ = ["DepthwisePlan", "PackedDepthwise", "depthwise_plan"]

_MOST_TAPS: Final = 128
# Elements of the longest vector that is loaded at once.
_VECTOR: Final = 16

# Elements of the scratches of a thread, where one plane takes no more: they stay in the first-level cache.
_BUFFER: Final = 1 << 12

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class DepthwisePlan:
    """Sizes of a convolution, and of the scratches of its kernels in elements.

    Attributes:
        size: Height and width of the input.
        out_size: Of the result.
        kernel: Of the kernel.
        geometry: Of the convolution.
        scratch: For the result, and for the gradient of the weight.
        back_scratch: For the gradient of the input.
    """

    size: Pair
    out_size: Pair
    kernel: Pair
    geometry: Geometry
    scratch: int
    back_scratch: int

    @property
    def keeps_size(self) -> bool:
        """Whether the result has the size of the input, and a pixel for each of its pixels."""
        return self.size == self.out_size and all(stride == 1 for stride in self.geometry.stride)

    @property
    def back_padding(self) -> Pair:
        """Zeros on both sides of the gradient of the result."""
        height, width = (
            dilation * (kernel - 1) - padding
            for kernel, padding, dilation in zip(
                self.kernel, self.geometry.padding, self.geometry.dilation, strict=True
            )
        )
        return height, width


@functools.lru_cache(maxsize=256)
def depthwise_plan(shape: torch.Size, size: tuple[int, ...], geometry: Geometry) -> DepthwisePlan | None:
    """The plan for a weight `[channels, 1, height, width]` and images of a size; None where the kernels have none.

    That is for kernels of more taps than they hold, for more zeros around an image than the kernel reaches over, and
    where there is no result.
    """
    kernel = tuple(shape[2:])
    axes = list(zip(size, kernel, *geometry, strict=True))
    reaches = [dilation * (taps - 1) for _, taps, _, _, dilation in axes]
    if shape[2:].numel() > _MOST_TAPS or any(
        padding > reach for (*_, padding, _), reach in zip(axes, reaches, strict=True)
    ):
        return None
    out = tuple(
        (pixels + 2 * padding - reach - 1) // stride + 1
        for (pixels, _, stride, padding, _), reach in zip(axes, reaches, strict=True)
    )
    if min(*out, *size) < 1:
        return None
    strides = geometry.stride
    return DepthwisePlan(
        (size[0], size[1]),
        (out[0], out[1]),
        (kernel[0], kernel[1]),
        geometry,
        _scratch(((out[0] - 1) * strides[0] + 1, (out[1] - 1) * strides[1] + 1), reaches),
        _scratch((size[0], size[1]), reaches),
    )


def _scratch(places: Pair, reaches: list[int]) -> int:
    """Elements for an image of which so many places are looked at, and for as many results."""
    columns = places[1] + reaches[1]
    return (places[0] + reaches[0]) * columns + (places[0] - 1) * columns + places[1] + 2 * _VECTOR


def _together(scratch: int) -> int:
    """How many planes are laid out at once."""
    return max(1, _BUFFER // scratch)


class PackedDepthwise:
    """The weight of a depthwise convolution.

    Args:
        values: What to multiply by, [active].
        bitmap: Where they stand, uint8, in row-major order.
        shape: Of the dense weight, [channels, 1, height, width].
        geometry: Of the convolution.
    """

    def __init__(self, values: Tensor, bitmap: Tensor, shape: torch.Size, geometry: Geometry) -> None:
        self._bitmap, self._shape, self._geometry = bitmap, shape, geometry
        self._weight = unpack(values, bitmap, shape)

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """The convolution of x, [N, channels, *size]; over x where that is allowed, which then has its shape."""
        plan = self._plan(x.shape)
        if bias is not None and bias.shape != x.shape[1:2]:
            raise ValueError(f"depthwise convolution: got a bias {list(bias.shape)}; expected {[x.shape[1]]}")
        bias = None if bias is None else bias.detach().to(self._weight.dtype).contiguous()
        source = self._checked(x, x.shape)
        if inplace and plan.keeps_size and x.is_contiguous():
            self._convolve(source, bias, source, plan)
            return x
        out = source.new_empty((*x.shape[:2], *plan.out_size))
        self._convolve(source, bias, out, plan)
        return out

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """Gradient of the input, of its shape, from that of the result, and over that where it is allowed."""
        plan = self._plan(x_shape)
        grad = self._checked(grad, (*x_shape[:2], *plan.out_size))
        out = grad if inplace and plan.keeps_size else grad.new_empty(x_shape)
        self._convolve(grad, None, out, plan, is_backward=True)
        return out

    def weight_gradient(self, grad: Tensor, x: Tensor | KeptSamples) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""
        plan = self._plan(x.shape)
        grad, out = self._checked(grad, (*x.shape[:2], *plan.out_size)), torch.zeros_like(self._weight)
        for place, some in samples_of(x):
            own = grad[place]
            decoded = self._checked(some, (len(own), *x.shape[1:]))
            threads = min(threads_for(decoded.numel()), self._shape[0])
            call(
                "depthwise_weight",
                FORMATS[own.dtype],
                decoded,
                own,
                out,
                *decoded.shape,
                *plan.out_size,
                *plan.kernel,
                *plan.geometry.dilation,
                *plan.geometry.padding,
                *plan.geometry.stride,
                own.new_empty(threads, _together(plan.scratch), plan.scratch),
                plan.scratch,
                _together(plan.scratch),
                threads,
            )
            del some, decoded  # or they would live until the next ones are there
        return gather(out, self._bitmap)

    def _convolve(
        self, source: Tensor, bias: Tensor | None, out: Tensor, plan: DepthwisePlan, *, is_backward: bool = False
    ) -> None:
        geometry, scratch = plan.geometry, plan.back_scratch if is_backward else plan.scratch
        threads = min(threads_for(max(source.numel(), out.numel())), source.shape[0] * source.shape[1])
        call(
            "depthwise",
            FORMATS[source.dtype],
            source,
            self._weight,
            bias,
            out,
            *source.shape,
            *out.shape[2:],
            *plan.kernel,
            *geometry.dilation,
            *(plan.back_padding if is_backward else geometry.padding),
            *(geometry.stride if is_backward else (1, 1)),
            *((1, 1) if is_backward else geometry.stride),
            int(is_backward),
            source.new_empty(threads, _together(scratch), scratch),
            scratch,
            _together(scratch),
            threads,
        )

    def _plan(self, x_shape: torch.Size) -> DepthwisePlan:
        """The plan for an input of a shape.

        Raises:
            ValueError: It does not fit the weight.
        """
        plan = (
            depthwise_plan(self._shape, x_shape[2:], self._geometry) if len(x_shape) == len(self._shape) == 4 else None
        )
        if plan is None or x_shape[1] != self._shape[0] or self._shape[1] != 1:
            raise ValueError(f"depthwise convolution: got an input {list(x_shape)} for a weight {list(self._shape)}")
        return plan

    def _checked(self, batch: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A batch in one run of memory.

        Raises:
            ValueError: It has another shape, or another type than the weight.
        """
        if batch.shape != shape or batch.dtype != self._weight.dtype:
            raise ValueError(
                f"depthwise convolution: got {batch.dtype}{list(batch.shape)}; "
                f"expected {self._weight.dtype}{list(shape)}"
            )
        return batch.detach().contiguous()
