"""Shapes without values: what the kernels would allocate for tensors that have no memory (meta and fake tensors).

With it a training step can be run under `torch._subclasses.FakeTensorMode` to learn its bytes without spending them.
How many elements a threshold keeps depends on values, so that a caller that knows the share gives it
(`PackedTensor.predicted`); `pack` alone assumes the worst, that everything is kept.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedmef_fx.packing.backend_numpy import block_nbytes
from fedmef_fx.packing.bitmap import bitmap_nbytes, check_bitmap
from fedmef_fx.packing.registry import announce_temporary
from fedmef_fx.packing.words import check_float

__all__ = ["MetaBackend"]


class MetaBackend:
    """`Backend` for tensors without values: it allocates what the others allocate, and computes nothing."""

    name = "meta"

    def __init__(self, cpu_backend: Callable[[], str]) -> None:
        """Stand for the backend of that name on the CPU."""
        self._cpu_backend = cpu_backend

    def pack(self, x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """See `Backend.pack`; keeps everything."""
        del threshold
        return self.keep(x, x.numel())

    def keep(self, x: Tensor, kept_count: int) -> tuple[Tensor, Tensor]:
        """`pack` that keeps so many elements, whichever they are."""
        check_float(x.dtype)
        values = x.new_empty(kept_count)
        if self._runs_in_numpy(x):
            announce_temporary(values.nbytes + block_nbytes(x))
        return _bitmap(x), values

    def unpack(self, bitmap: Tensor, values: Tensor, *, out: Tensor) -> None:
        """See `Backend.unpack`."""
        del values
        check_bitmap(bitmap, out.numel())
        if self._runs_in_numpy(out):
            announce_temporary(block_nbytes(out))

    def gather(self, bitmap: Tensor, dense: Tensor) -> Tensor:
        """See `Backend.gather`; gathers everything."""
        check_bitmap(bitmap, dense.numel())
        return dense.new_empty(dense.numel())

    def clamp_bits(self, x: Tensor, *, out: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
        """See `Backend.clamp_bits`."""
        del out, low, high
        check_float(x.dtype)
        return _bitmap(x)

    def mask_by_bits(self, bitmap: Tensor, grad: Tensor, *, out: Tensor, scale_off: float = 0.0) -> None:
        """See `Backend.mask_by_bits`."""
        del out, scale_off
        check_bitmap(bitmap, grad.numel())

    def _runs_in_numpy(self, x: Tensor) -> bool:
        """Whether the tensor stands for one that numpy would pack, with numpy's temporaries."""
        return x.device.type == "cpu" and self._cpu_backend() == "numpy"


def _bitmap(x: Tensor) -> Tensor:
    return x.new_empty(bitmap_nbytes(x.numel()), dtype=torch.uint8)
