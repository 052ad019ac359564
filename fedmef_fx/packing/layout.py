"""The order of a tensor's elements in memory, so that any dense tensor can be treated as flat without a copy."""

import dataclasses
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["MemoryLayout", "has_no_values", "is_same_memory", "on_device"]

_FAKE: Final = torch._C._TorchDispatchModeKey.FAKE


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryLayout:
    """Shape and strides of a dense tensor: contiguous, channels last, transposed, ...

    Two tensors of one layout have corresponding elements at corresponding places of their flat views.

    Attributes:
        shape: Sizes.
        stride: Strides in elements.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> "MemoryLayout":
        """The layout of `x`; for a tensor with gaps or overlaps (slices, expanded ones) that of its contiguous copy."""
        shape = tuple(x.shape)
        if torch.compiler.is_compiling():  # torch.compile knows no strides that depend on sizes
            return cls(shape, _contiguous(shape))
        expected = 1
        for size, stride in sorted(zip(shape, x.stride(), strict=True), key=lambda axis: (axis[1], axis[0])):
            if size != 1 and stride != expected:
                return cls(shape, _contiguous(shape))
            expected *= size
        return cls(shape, tuple(x.stride()) if expected else _contiguous(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    def flatten(self, x: Tensor) -> Tensor:
        """The elements of `x` `[*shape]` in this layout's order, `[n]`, detached; a view where `x` has this layout.

        Raises:
            ValueError: Another shape.
        """
        if tuple(x.shape) != self.shape:
            raise ValueError(f"MemoryLayout.flatten: got a tensor {list(x.shape)}; expected {list(self.shape)}")
        x = x.detach()
        if not self.describes(x):
            x = torch.empty_strided(self.shape, self.stride, dtype=x.dtype, device=x.device).copy_(x)
        return x.as_strided((self.numel,), (1,))

    def describes(self, x: Tensor) -> bool:
        """Whether `x` has these strides; that of an axis of size 1 is never used."""
        if torch.compiler.is_compiling():
            return x.is_contiguous() and self.stride == _contiguous(self.shape)
        axes = zip(self.shape, x.stride(), self.stride, strict=True)
        return self.numel == 0 or all(size == 1 or got == wanted for size, got, wanted in axes)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def has_no_values(x: Tensor) -> bool:
    """Whether a tensor has a shape only: it is on the meta device, or a fake that stands in for one elsewhere.

    What a real tensor leads to under `FakeTensorMode` is fake, too.
    """
    if isinstance(x, FakeTensor) or x.device.type == "meta":
        return True
    core = torch._C
    return core._len_torch_dispatch_stack() > 0 and core._get_dispatch_mode(_FAKE) is not None


def is_same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors begin at the same address; also for tensors without values, which have none."""
    same_storage = first.untyped_storage()._cdata == second.untyped_storage()._cdata
    return same_storage and first.storage_offset() == second.storage_offset()


def on_device(constant: Tensor, device: torch.device) -> Tensor:
    """A small tensor from the CPU on a device, without waiting for it, as `torch.tensor(..., device=device)` does."""
    return constant if device.type == "cpu" else constant.to(device, non_blocking=True)
