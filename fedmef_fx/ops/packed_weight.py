"""A packed weight: the active values `[active]` and a bitmap of where they stand, made dense for one layer at a time.

    forward:   values --standardise, if an NSConv--> values --unpack by the bitmap--> dense weight
    backward:  dense gradient --gather by the bitmap--> gradient of the values --backward of standardising-->

All that is as large as the dense weight are the results of `PackedKernel.dense` and what `gradient` is given. The
equations of the NSConv are those of `ops/nsconv.py`, on packed rows.
"""

import dataclasses
import functools

import torch
from torch import Tensor

from fedmef_fx.memory import backend_for
from fedmef_fx.ops import growth
from fedmef_fx.ops.nsconv import KernelForm, Standardized, standardize_backward
from fedmef_fx.ops.rows import Rows

__all__ = ["PackedKernel", "gather", "unpack"]


def unpack(values: Tensor, bitmap: Tensor, shape: torch.Size) -> Tensor:
    """Values at the set positions of a dense tensor, 0 elsewhere.

    Args:
        values: [active].
        bitmap: uint8, one bit per element of the dense tensor in row-major order.
        shape: Of the dense tensor.
    """
    dense = values.new_empty(shape)
    backend_for(dense).unpack(bitmap, values.detach().contiguous(), out=dense.view(-1))
    return dense


def gather(dense: Tensor, bitmap: Tensor) -> Tensor:
    """The inverse of `unpack`: the values of a dense tensor at the set positions, `[active]`."""
    return backend_for(dense).gather(bitmap, dense.detach().reshape(-1))


@dataclasses.dataclass(frozen=True)
class PackedKernel:
    """A packed weight on its way to the dense one and back; what both ways share is computed once.

    Attributes:
        weight: The active values, [active].
        gain: gain_i of an NSConv, [out]; None for a weight that is not standardised.
        bitmap: Where the values stand.
        form: How an NSConv standardises.
        shape: Of the dense weight.
    """

    weight: Tensor
    gain: Tensor | None
    bitmap: Tensor
    form: KernelForm
    shape: torch.Size

    @functools.cached_property
    def _standardized(self) -> tuple[Rows, Standardized] | None:
        """The rows and the kernel in factors; None for a weight that is not standardised."""
        if self.gain is None:
            return None
        rows = self.form.packed_rows(self.bitmap, self.shape)
        return rows, self.form.standardize(self.weight.detach(), rows, self.gain.detach())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dense weight to compute with, of a type."""
        if self.weight.device.type == "meta":  # there are shapes only, and no bits to look at
            return self.weight.new_empty(self.shape, dtype=dtype)
        values = self.weight.detach()
        if self._standardized is not None:
            rows, kernel = self._standardized
            values = kernel.base * rows.spread(kernel.scale)
        return unpack(values.to(dtype), self.bitmap, self.shape)

    def gradient(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the active values and of gain.

        While growth candidates are collected, the gradient at inactive positions is offered before it is dropped, as
        by the dense form.

        Args:
            grad: Of the dense weight's shape; may be of lower precision.
        """
        if self.weight.device.type == "meta":
            return torch.empty_like(self.weight), None if self.gain is None else torch.empty_like(self.gain)
        active = gather(grad, self.bitmap).to(self.weight.dtype)
        if self._standardized is None:
            growth.offer(self.bitmap, grad)
            return active, None
        rows, kernel = self._standardized
        if growth.is_collecting():
            growth.offer(self.bitmap, _scaled(grad, kernel.scale, self.form))
        return standardize_backward(kernel, rows, active, g=self.form.g)


def _scaled(grad: Tensor, scale: Tensor, form: KernelForm) -> Tensor:
    """A dense gradient with each row multiplied by its scale."""
    return form.kernel(form.rows(grad).to(scale.dtype) * scale.unsqueeze(1), grad.shape)
