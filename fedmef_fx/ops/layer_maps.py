"""What layers compute with a dense weight, and its gradients: convolutions of 1 to 3 dimensions, and linear layers."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fedmef_fx.ops.sparse_convolution import Geometry
from fedmef_fx.ops.sparse_ways import MakeWay, convolution_way, depthwise_way, linear_way
from fedmef_fx.packing.sample_parts import KeptSamples, samples_of

__all__ = ["ConvolutionGeometry", "LinearMap"]

# Elements of a batch of which oneDNN's copies are worth avoiding.
_LARGE: Final = 1 << 21
# Elements that are worked on at a time.
_TOGETHER: Final = 1 << 16


class ConvolutionGeometry(NamedTuple):
    """A convolution without its weight, of 1 to 3 spatial dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x, [N, in, *size]."""
        rest = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        return _in_parts(x, lambda some: torch.convolution(some, weight, bias, *rest))

    def parameter_gradients(
        self, grad: Tensor, x: Tensor | KeptSamples, weight_shape: torch.Size, *, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weight and the bias; exact in x.

        Of a large batch a few samples are decoded at a time. The dense weight is not made: torch asks for it, and never
        looks at its values.
        """
        total = list[Tensor]()
        for part, some in samples_of(x, least=weight_shape.numel()):
            stand_in = _stand_in(weight_shape, *total, grad)
            gradients = self._backward(grad[part], some, stand_in, (False, True, has_bias))[1 : 3 if has_bias else 2]
            total = [a.add_(b) for a, b in zip(total, gradients, strict=True)] if total else list(gradients)
            del some, gradients  # or they would live until the next ones are there
        return total[0], total[1] if has_bias else None

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """Gradient of the input; x itself is not needed, only its shape."""
        return _in_parts(grad, lambda some: self._input_gradient(some, x_shape[1:], weight))

    def _input_gradient(self, grad: Tensor, sample_shape: torch.Size, weight: Tensor) -> Tensor:
        x_shape = torch.Size((grad.shape[0], *sample_shape))
        if grad.is_contiguous() and grad.numel() >= x_shape.numel():
            # torch wants an x and never looks at its values.
            result: Tensor = self._backward(grad, _stand_in(x_shape, grad), weight, (True, False, False))[0]
            return result
        return self._convolve_back(grad, x_shape, weight)

    def _convolve_back(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """The same as a convolution: transposed for an ordinary one, ordinary for a transposed one."""
        rest = tuple(
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                x_shape[2:], grad.shape[2:], self.stride, self.padding, self.dilation, weight.shape[2:], strict=True
            )
        )
        output_padding = (0,) * len(rest) if self.transposed else rest
        result: Tensor = torch.convolution(
            grad,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            not self.transposed,
            output_padding,
            self.groups,
        )
        return result

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the bias."""
        return grad.sum(dim=[0, *range(2, grad.dim())])

    def keeps_shape(self, x_shape: torch.Size, weight_shape: torch.Size) -> bool:
        """Whether the result has the shape of the input."""
        if self.transposed or weight_shape[0] != x_shape[1] or weight_shape[1] * self.groups != x_shape[1]:
            return False
        axes = zip(weight_shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return all(s == 1 and 2 * padding == dilation * (kernel - 1) for kernel, s, padding, dilation in axes)

    def sparse_way(self, x: Tensor, active: int, weight_shape: torch.Size) -> MakeWay | None:
        """How it computes from so many active weights alone; None where a dense product is faster."""
        if self.transposed:
            return None
        geometry = Geometry(self.stride, self.padding, self.dilation)
        if self.groups == 1:
            return convolution_way(x, active, weight_shape, geometry)
        return depthwise_way(x, weight_shape, geometry) if self.groups == weight_shape[0] else None

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, which: tuple[bool, bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [grad.shape[1]],
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            which,
        )


def _in_parts(batch: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of samples, of a large batch worked out a few samples at a time.

    oneDNN lays out in another order all that it gets and gives: of a whole batch that is as much memory again.
    """
    if batch.numel() < _LARGE or batch.device.type != "cpu" or not batch.is_contiguous():
        return function(batch)
    together = max(_TOGETHER // batch[0].numel(), 1)
    results: Tensor | None = None
    for start in range(0, batch.shape[0], together):
        some = function(batch[start : start + together])
        results = some.new_empty((batch.shape[0], *some.shape[1:])) if results is None else results
        results[start : start + together] = some
        del some  # or it would live until the next one is there
    return function(batch) if results is None else results


def _stand_in(shape: torch.Size, *others: Tensor) -> Tensor:
    """A tensor whose values nobody reads, in the memory of another one where one is large enough.

    One without memory, of stride 0, would be copied to some.
    """
    for other in others:
        if other.is_contiguous() and other.numel() >= shape.numel():
            return other.view(-1)[: shape.numel()].view(shape)
    return others[-1].new_empty(shape)


class LinearMap:
    """x W^T + b over the last dimension."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's result."""
        return F.linear(x, weight, bias)

    def parameter_gradients(
        self, grad: Tensor, x: Tensor | KeptSamples, weight_shape: torch.Size, *, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weight and the bias; exact in x."""
        x = x.whole() if isinstance(x, KeptSamples) else x
        grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return grad_weight, self.bias_gradient(grad) if has_bias else None

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """Gradient of an input of some shape."""
        return grad @ weight

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the bias."""
        return grad.reshape(-1, grad.shape[-1]).sum(0)

    def keeps_shape(self, x_shape: torch.Size, weight_shape: torch.Size) -> bool:
        """False: nothing writes over the inputs of linear layers."""
        return False

    def sparse_way(self, x: Tensor, active: int, weight_shape: torch.Size) -> MakeWay | None:
        """How it computes from so many active weights alone; None where a dense product is faster."""
        return linear_way(x, active, weight_shape)
