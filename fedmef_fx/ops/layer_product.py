"""The two ways in which a layer multiplies by its stored weight: through a dense one, or by the active values alone."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fedmef_fx.ops.effective_weight import Recipe, StoredWeight, effective_weight, effective_weight_backward
from fedmef_fx.ops.packed_weight import active_values, active_values_backward
from fedmef_fx.ops.sparse_ways import MakeWay
from fedmef_fx.packing.sample_parts import KeptSamples, samples_together

__all__ = ["DenseProduct", "Layer", "LayerProduct", "SparseProduct", "sparse_way"]


class Layer(Protocol):
    """How a layer maps its input by a dense weight, and the gradients of that map."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's result."""

    def parameter_gradients(
        self, grad: Tensor, x: Tensor | KeptSamples, weight_shape: torch.Size, *, has_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of a dense weight of some shape and the bias, from that of the result; exact in x."""

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
        """Gradient of an input of some shape."""

    def bias_gradient(self, grad: Tensor) -> Tensor:
        """Gradient of the bias."""

    def keeps_shape(self, x_shape: torch.Size, weight_shape: torch.Size) -> bool:
        """Whether the result of an input has its shape, and each sample's part in it depends on that sample alone."""

    def sparse_way(self, x: Tensor, active: int, weight_shape: torch.Size) -> MakeWay | None:
        """How it computes from so many active weights alone; None where a dense product is faster."""


class LayerProduct(Protocol):
    """A layer with its stored weight."""

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """The layer's result.

        Args:
            x: The input.
            bias: Of the layer.
            inplace: Whether it may be written over the input, which has its shape; then that may be returned.
        """

    def gradients(self, grad: Tensor, x: Tensor | KeptSamples, *, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """Gradients of the weight that is multiplied by, and of the bias, from that of the result; exact in x."""

    def stored_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the stored weight, exactly 0 where masked, and of gain, from that of `gradients`."""

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """Gradient of an input of some shape.

        Args:
            grad: That of the result.
            x_shape: Of the input.
            inplace: Whether it may be written over `grad`, which has its shape; then that may be returned.
        """

    def add_input_gradient(self, grad: Tensor, total: Tensor) -> None:
        """Add the gradient of the input to another one, of a layer of which samples do not meet."""


def sparse_way(layer: Layer, stored: StoredWeight, x: Tensor, dtype: torch.dtype) -> MakeWay | None:
    """What `SparseProduct` takes, where that is the faster way.

    Args:
        layer: The layer.
        stored: Its weight.
        x: Its input.
        dtype: To compute in.
    """
    if stored.packed_shape is None or not x.dtype == dtype == stored.weight.dtype:
        return None
    return layer.sparse_way(x, stored.weight.numel(), stored.packed_shape)


class DenseProduct:
    """Through the dense weight, which is made when it is first asked for.

    Args:
        layer: The layer.
        stored: Its weight.
        recipe: From `recipe_of` on it.
        dtype: To compute in.
        is_remade: Whether the dense weight is made again for each use rather than kept from one to the next, so that
            it is gone while others deal with the dense gradient.
    """

    def __init__(
        self, layer: Layer, stored: StoredWeight, recipe: Recipe | None, dtype: torch.dtype, *, is_remade: bool = False
    ) -> None:
        self._layer, self._stored, self._recipe = layer, stored, recipe

        def made() -> Tensor:
            return effective_weight(stored, dtype, recipe=recipe)

        self._weight = made if is_remade else functools.cache(made)

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """See `LayerProduct.forward`."""
        if not inplace:
            return self._layer.forward(x, self._weight(), bias)
        weight = self._weight()
        return _over(x, lambda some: self._layer.forward(some, weight, bias), least=weight.numel())

    def gradients(self, grad: Tensor, x: Tensor | KeptSamples, *, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """See `LayerProduct.gradients`; that of the dense weight."""
        return self._layer.parameter_gradients(grad, x, self._stored.shape, has_bias=has_bias)

    def stored_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `LayerProduct.stored_gradients`."""
        return effective_weight_backward(self._stored, gradient, recipe=self._recipe)

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """See `LayerProduct.input_gradient`."""
        if not inplace:
            return self._layer.input_gradient(grad, x_shape, self._weight())
        weight = self._weight()
        return _over(grad, lambda some: self._layer.input_gradient(some, some.shape, weight), least=weight.numel())

    def add_input_gradient(self, grad: Tensor, total: Tensor) -> None:
        """See `LayerProduct.add_input_gradient`."""
        weight = self._weight()
        _add_parts(grad, total, lambda own, shape: self._layer.input_gradient(own, shape, weight), least=weight.numel())


def _over(batch: Tensor, function: Callable[[Tensor], Tensor], *, least: int) -> Tensor:
    """A function of samples, written over these a few at a time; a new tensor for a small batch."""
    together = samples_together(batch.shape, least=least)
    if together >= batch.shape[0]:
        return function(batch)
    for part in torch.split(batch, together):
        part.copy_(function(part))
    return batch


def _add_parts(
    grad: Tensor, total: Tensor, gradient: Callable[[Tensor, torch.Size], Tensor], *, least: int = 0
) -> None:
    """Add the gradient of samples to another one, a few at a time."""
    together = samples_together(total.shape, least=least)
    for part, own in zip(torch.split(total, together), torch.split(grad, together), strict=True):
        part.add_(gradient(own, part.shape))


class SparseProduct:
    """By the active values alone; arguments as of `DenseProduct`, and from `sparse_way`."""

    def __init__(self, layer: Layer, stored: StoredWeight, recipe: Recipe | None, way: MakeWay) -> None:
        weight, gain, bitmap, form, shape = stored
        if bitmap is None or shape is None:
            raise TypeError("SparseProduct: got a weight that is stored dense; expected a packed one")
        self._layer = layer
        self._given = (weight, gain, bitmap, form)
        self._options: dict[str, Any] = {"shape": shape, "recipe": recipe}
        self._weight = way(active_values(*self._given, **self._options), bitmap)

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """See `LayerProduct.forward`."""
        return self._weight.forward(x, bias, inplace=True) if inplace else self._weight.forward(x, bias)

    def gradients(self, grad: Tensor, x: Tensor | KeptSamples, *, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        """See `LayerProduct.gradients`; that of the active values, [active]."""
        return self._weight.weight_gradient(grad, x), self._layer.bias_gradient(grad) if has_bias else None

    def stored_gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `LayerProduct.stored_gradients`."""
        return active_values_backward(*self._given, grad=gradient, **self._options)

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """See `LayerProduct.input_gradient`."""
        if inplace:
            return self._weight.input_gradient(grad, x_shape, inplace=True)
        return self._weight.input_gradient(grad, x_shape)

    def add_input_gradient(self, grad: Tensor, total: Tensor) -> None:
        """See `LayerProduct.add_input_gradient`."""
        _add_parts(grad, total, self._weight.input_gradient)
