"""A masked weight, however it is stored.

- *Dense*: the parameter `weight` has the weight's shape and is 0 where masked; next to it stands a boolean buffer
  `weight_mask` of the same shape.
- *Packed*: the parameter `weight` is one-dimensional, the active values in row-major order; next to it stands a uint8
  buffer `weight_bitmap` with one bit per weight (`memory.bitmap`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fedmef_fx.native import call, threads_for, why_missing
from fedmef_fx.ops.packed_weight import unpack
from fedmef_fx.packing.bitmap import pack_bits, unpack_bits
from fedmef_fx.sparse_model.optimizer_state import StateUpdate, forget_state, update_state

__all__ = ["MaskedParameter", "bitmap_name", "clear_masked", "mask_name", "resize", "resizes"]


def mask_name(parameter: str) -> str:
    """The name of the mask buffer of a dense parameter: `conv1.weight` -> `conv1.weight_mask`."""
    return f"{parameter}_mask"


def bitmap_name(parameter: str) -> str:
    """The name of the bitmap buffer of a packed parameter: `conv1.weight` -> `conv1.weight_bitmap`."""
    return f"{parameter}_bitmap"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MaskedParameter:
    """A parameter with what says which of its weights are active. It unpacks as `parameter, mask`.

    Attributes:
        parameter: The live parameter.
        buffer: The live buffer next to it: mask or bitmap.
        shape: Shape of the dense weight.
    """

    parameter: nn.Parameter
    buffer: Tensor
    shape: torch.Size

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.parameter, self.mask))

    @property
    def is_packed(self) -> bool:
        """Whether only the active values are stored."""
        return self.buffer.dtype == torch.uint8

    @property
    def mask(self) -> Tensor:
        """Boolean, of the dense weight's shape, True = active: the live buffer when dense, made again when packed."""
        return unpack_bits(self.buffer, self.numel).view(self.shape) if self.is_packed else self.buffer

    @property
    def numel(self) -> int:
        """Number of weights, masked ones included."""
        return self.shape.numel()

    @property
    def active(self) -> int:
        """Number of active weights."""
        return self.parameter.numel() if self.is_packed else int(self.buffer.count_nonzero())

    def positions(self) -> Tensor:
        """Flat (row-major) positions of the active weights in the dense weight, int64 `[active]`, ascending."""
        return self.mask.flatten().nonzero().squeeze(1)

    def values(self) -> Tensor:
        """A copy of the active values `[active]`, in row-major order."""
        return self.collect(self.parameter)

    def dense(self) -> Tensor:
        """A copy of the weight in its dense shape, 0 where masked."""
        return self.expand(self.parameter)

    def collect(self, tensor: Tensor) -> Tensor:
        """The active part `[active]` of a tensor of the parameter's form, such as its gradient; a copy."""
        return tensor.detach().clone() if self.is_packed else tensor.detach()[self.buffer]

    def expand(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's form, such as its gradient, in the dense shape with 0 where masked; a copy."""
        tensor = tensor.detach()
        if not self.is_packed:
            return torch.where(self.buffer, tensor, 0.0)
        return unpack(tensor, self.buffer, self.shape)

    def places(self, positions: Tensor) -> Tensor:
        """Where positions of the dense weight stand in the parameter as it is stored, -1 for those it does not hold.

        Args:
            positions: Flat (row-major) positions, int64 `[k]`.
        """
        if not self.is_packed:
            return positions
        active = self.positions()
        if not active.numel():
            return torch.full_like(positions, -1)
        places = torch.searchsorted(active, positions).clamp_max(active.numel() - 1)
        return torch.where(active[places] == positions, places, -1)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Overwrite the active values `[active]`, in row-major order; masked weights become 0."""
        values = values.to(self.parameter.device, self.parameter.dtype)
        if self.is_packed:
            self.parameter.copy_(values)
        else:
            self.parameter.copy_(torch.zeros_like(self.parameter).masked_scatter_(self.buffer, values))

    def clear_masked(self) -> None:
        """Set masked weights to 0; packed ones are not there."""
        if not self.is_packed:
            clear_masked(self.parameter, self.buffer)

    @torch.no_grad()
    def change(self, mask: Tensor) -> None:
        """Change the topology: weights that stay active keep their value, others become 0.

        So do their gradients, and their state in optimizers.

        Args:
            mask: Boolean, of the dense weight's shape.
        """
        new = mask.to(self.buffer.device)
        if self.is_packed:
            self._change_packed(new)
            return
        survivors = self.buffer & new
        pruned = ~survivors
        self.parameter.masked_fill_(pruned, 0.0)
        if self.parameter.grad is not None:
            self.parameter.grad.masked_fill_(pruned, 0.0)
        forget_state(self.parameter, keep=survivors, before=self.buffer)
        self.buffer.copy_(new)

    def _change_packed(self, new: Tensor) -> None:
        move = StateUpdate.between(self.mask, new)
        parameter = self.parameter
        values, gradient = move.on(parameter.detach()), parameter.grad
        parameter.grad = None
        resize(parameter, values)
        if gradient is not None:
            parameter.grad = move.on(gradient)
        self.buffer.copy_(pack_bits(new))
        update_state(parameter, move)


def clear_masked(parameter: Tensor, mask: Tensor) -> None:
    """Set a tensor to 0 where masked, also where it is not finite there.

    Args:
        parameter: Any shape.
        mask: Boolean, of its shape; True = active.
    """
    # Through `.data` autograd counts no write: a backward that waits for the weight read 0 there, and may go on.
    values = parameter.data
    if _has_kernel(values, mask):
        call("clear", values.itemsize, mask, values, values.numel(), threads_for(values.numel()))
    else:
        torch.where(mask, values, values.new_zeros(()), out=values)


def _has_kernel(values: Tensor, mask: Tensor) -> bool:
    """Whether the compiled kernel can clear a tensor: it is several times as fast, and runs after every step."""
    return (
        type(values) is Tensor
        and values.is_cpu
        and mask.is_cpu
        and values.is_floating_point()
        and values.itemsize > 1
        and mask.dtype is torch.bool
        and mask.shape == values.shape
        and values.is_contiguous()
        and mask.is_contiguous()
        and why_missing() is None
    )


_RESIZES: Any = WeakIdKeyDictionary()  # torch leaves its methods unannotated


def resizes(parameter: nn.Parameter) -> int:
    """How often a parameter got another size: whoever listened to its gradient before then hears it no more."""
    return int(_RESIZES.get(parameter, 0))


def resize(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter, which stays the same object, a value that may have another size; it must have no gradient."""
    if values.shape == parameter.shape and values.dtype == parameter.dtype:
        # In place: DistributedDataParallel listens to the node that accumulates the gradient, which stays then.
        with torch.no_grad():
            parameter.copy_(values)
        return
    # As long as any graph of an earlier step lives, so does the node that accumulates the parameter's gradient, and
    # that insists on the old size. torch makes a new one when the type changes, so it changes for a moment.
    _RESIZES[parameter] = resizes(parameter) + 1
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = values
