"""The site where an activation is packed: one per pruned tensor of a graph, shared by all layers that read it."""

from typing import Any, Literal

import torch
from torch import Tensor

from fedmef_fx.ops.noise_site import NoiseSite, SiteState
from fedmef_fx.ops.rectified import rectified
from fedmef_fx.packing import (
    BlockCode,
    BlockwiseTensor,
    KeptTensor,
    PackedTensor,
    RectifiedTensor,
    ThresholdEstimator,
    why_dense,
)
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.tracers import is_traced

__all__ = ["PackActivation"]

_SHARE_OF_POSITIVES = 0.5
"""What a ReLU is expected to let through before it was seen."""


class PackActivation(NoiseSite):
    """Keeps an activation for the backward of the layers that read it: its largest part, in few bits, or both.

    Without a sparsity all of it is coded. Of the result of a ReLU, or of a max pooling of one, whose mask is kept
    anyway, only the positive part is (`fedmef_fx.packing.rectified`), but for GPUs, where what is kept has one size
    whatever the values.

    Attributes:
        activation_sparsity: gamma, the share that is dropped, by magnitude.
        code: How what is kept is coded; None keeps values.
        estimator: The threshold of this tensor, estimated from samples every few steps.
        noise: Of stochastic rounding.
        value_dtype: Type in which values that are not coded are stored; "same" as the activation's.
        reason: Why the last tensor was left to be kept as it is; empty where it was packed.
    """

    code: BlockCode | None = None  # a model that was pickled before there were codes has none

    def __init__(
        self,
        activation_sparsity: float,
        *,
        sample: int,
        interval: int,
        value_dtype: Literal["same", "bfloat16", "float16"] = "same",
        code: BlockCode | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.value_dtype: Literal["same", "bfloat16", "float16"] = value_dtype
        self.reason = ""
        self.activation_sparsity = activation_sparsity
        self.code = code
        self.estimator = ThresholdEstimator(kept_target=1.0 - activation_sparsity, sample=sample, interval=interval)

    def forward(self, x: Tensor) -> KeptTensor | None:
        """Pack x, of any shape; None where no gradient is recorded, x is not floating point, or x takes fewer bytes.

        Under `torch.no_grad()` and while traced nothing is kept and the state stays as it is.
        """
        if not torch.is_grad_enabled() or not x.is_floating_point() or is_traced():
            return None
        keeps_all = self.activation_sparsity == 0
        kept = self._packed(x) if self.code is None or not keeps_all else self._coded(x, self.code)
        self.reason = why_dense(kept.nbytes, x.numel(), x.dtype)
        return None if self.reason else kept

    def _coded(self, x: Tensor, code: BlockCode) -> KeptTensor:
        """All of x in a code."""
        key = None if code.rounding == "nearest" else self.noise.next_key()
        # To learn how much is positive, the host would have to wait for a GPU.
        relu = rectified(x) if x.device.type == "cpu" or has_no_values(x) else None
        if relu is None:
            return BlockwiseTensor.encode(x.detach(), code, key=key)
        expected = _SHARE_OF_POSITIVES if self.estimator.kept is None else self.estimator.kept
        options: dict[str, Any] = {"high": relu.high, "slope": relu.slope, "key": key, "expected_kept": expected}
        kept = RectifiedTensor.encode(x.detach(), relu.bits, code, **options)
        if not has_no_values(x):
            self.estimator.observe(kept.values.shape.numel(), x.numel())
        return kept

    def _packed(self, x: Tensor) -> PackedTensor:
        """The largest part of x."""
        if has_no_values(x):
            packed = PackedTensor.predicted(x, kept=self.estimator.expected_kept)
        else:
            packed = PackedTensor.pack(x.detach(), threshold=self.estimator.threshold(x))
            self.estimator.observe(packed.count, x.numel())
        if self.code is not None:
            return packed.coded(self.code, key=None if self.code.rounding == "nearest" else self.noise.next_key())
        return packed if self.value_dtype == "same" else packed.narrowed(getattr(torch, self.value_dtype))

    @property
    def state(self) -> SiteState:
        """All that the next call depends on."""
        return (*self.estimator.state, self.noise.draws)

    @state.setter
    def state(self, state: SiteState) -> None:
        threshold, calls, has_drifted, kept, draws = state
        self.estimator.state, self.noise.draws = (threshold, calls, has_drifted, kept), draws

    def reset(self, *, draws: int = 0) -> None:
        """See `NoiseSite.reset`."""
        self.estimator.reset()
        super().reset(draws=draws)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        code = "" if self.code is None else f", bits={self.code.bits}"
        return f"activation_sparsity={self.activation_sparsity:g}{code}"
