"""The site where an activation is packed: one per pruned tensor of a graph, shared by all layers that read it."""

from typing import Literal

import torch
from torch import Tensor, nn

from fedmef_fx.packing import PackedTensor, ThresholdEstimator, why_dense
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.tracers import is_traced

__all__ = ["PackActivation"]


class PackActivation(nn.Module):
    """Keeps the largest 1 - gamma of an activation, by magnitude, for the backward of the layers that read it.

    Attributes:
        estimator: The threshold of this tensor, estimated from samples every few steps.
        value_dtype: Type in which the kept values are stored; "same" as the activation's.
        reason: Why the last tensor was left to be kept as it is; empty where it was packed.
    """

    def __init__(
        self,
        activation_sparsity: float,
        *,
        sample: int,
        interval: int,
        value_dtype: Literal["same", "bfloat16", "float16"] = "same",
    ) -> None:
        super().__init__()
        self.value_dtype: Literal["same", "bfloat16", "float16"] = value_dtype
        self.reason = ""
        self.activation_sparsity = activation_sparsity
        self.estimator = ThresholdEstimator(kept_target=1.0 - activation_sparsity, sample=sample, interval=interval)

    def forward(self, x: Tensor) -> PackedTensor | None:
        """Pack x, of any shape; None where no gradient is recorded, x is not floating point, or x takes fewer bytes.

        Under `torch.no_grad()` and while traced nothing is kept and the threshold stays as it is.
        """
        if not torch.is_grad_enabled() or not x.is_floating_point() or is_traced():
            return None
        if has_no_values(x):
            packed = PackedTensor.predicted(x, kept=self.estimator.expected_kept)
        else:
            packed = PackedTensor.pack(x.detach(), threshold=self.estimator.threshold(x))
            self.estimator.observe(packed.values.numel(), x.numel())
        if self.value_dtype != "same":
            packed = packed.narrowed(getattr(torch, self.value_dtype))
        self.reason = why_dense(packed.nbytes, x.numel(), x.dtype)
        return None if self.reason else packed

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"activation_sparsity={self.activation_sparsity:g}"
