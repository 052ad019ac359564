"""`ThresholdEstimator`: the magnitude above which a wanted share of a tensor's elements lies, at little cost.

An exact threshold needs a selection over the whole tensor at every step. A sample is enough if what it leads to is
checked: m = 8192 elements put the kept share within about sqrt(k (1 - k) / m), 0.3 percentage points at k = 0.1, and
the distribution of one activation moves slowly, so that the threshold serves several steps. `observe` reports what
really was kept.
"""

import math
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.packing.layout import MemoryLayout

__all__ = ["ThresholdEstimator"]

# Re-estimate when the kept share is off by more than this part of its target.
_DRIFT: Final = 0.25


class ThresholdEstimator:
    """A threshold for one place in a model, refreshed now and then.

    Args:
        kept_target: Share of elements to keep, in (0, 1]; 1 - gamma. 1 gives the threshold 0: all that is not zero.
        sample: Elements looked at, about; tensors up to this size are looked at in full.
        interval: Calls of `threshold` (training steps) that one estimate serves.

    Raises:
        ConfigError: A value out of range.

    Example:
        >>> estimator = ThresholdEstimator(kept_target=0.25)
        >>> estimator.threshold(torch.tensor([1.0, -2.0, 3.0, -4.0]))
        3.0
    """

    __slots__ = ("_calls", "_drifted", "_threshold", "interval", "kept", "kept_target", "sample")

    kept: float | None

    def __init__(self, *, kept_target: float, sample: int = 8192, interval: int = 8) -> None:
        if not 0.0 < kept_target <= 1.0:
            raise ConfigError(f"ThresholdEstimator.kept_target: got {kept_target!r}; expected a number in (0, 1]")
        if sample < 1 or interval < 1:
            raise ConfigError(f"ThresholdEstimator: got sample={sample!r}, interval={interval!r}; expected both >= 1")
        self.kept_target = kept_target
        self.sample = sample
        self.interval = interval
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call estimates again. What follows then depends on nothing that came before."""
        self._threshold = 0.0
        self._calls = 0
        self._drifted = False
        self.kept = None

    def threshold(self, x: Tensor) -> float:
        """The threshold for this step; strictly larger magnitudes are to be kept.

        Args:
            x: The tensor to be packed, any shape and strides.

        Returns:
            A finite number >= 0. Waits for the device when it estimates, otherwise not.
        """
        if self.kept_target == 1.0:
            return 0.0
        if self._drifted or self._calls % self.interval == 0:
            self._threshold = self._estimate(x)
            self._calls = 0
            self._drifted = False
        self._calls += 1
        return self._threshold

    @property
    def state(self) -> tuple[float, int, bool, float | None]:
        """All that the next call depends on: threshold, calls it served, whether it drifted, the share last kept."""
        return self._threshold, self._calls, self._drifted, self.kept

    @state.setter
    def state(self, state: tuple[float, int, bool, float | None]) -> None:
        self._threshold, self._calls, self._drifted, self.kept = state

    @property
    def expected_kept(self) -> float:
        """The share that the next call will keep, 0-1: the one last observed, before the first call the target."""
        return self.kept_target if self.kept is None else self.kept

    def observe(self, kept_count: int, numel: int) -> None:
        """Report how many of `numel` elements the last threshold kept; a drift makes the next call estimate again."""
        if numel == 0:
            return
        self.kept = kept_count / numel
        excess = self.kept - self.kept_target
        # With a threshold of 0 everything but zeros is kept already: less than wanted is then no drift.
        too_few = excess < 0 and self._threshold > 0.0
        self._drifted = (excess > 0 or too_few) and abs(excess) > _DRIFT * self.kept_target

    def _estimate(self, x: Tensor) -> float:
        flat = MemoryLayout.of(x).flatten(x)
        if flat.numel() == 0:
            return 0.0
        sample = flat[:: self._step(flat.numel())]
        # float32 holds the 16-bit formats exactly, and selects them faster
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        # A NaN is kept whatever the threshold, like an infinity, so it takes part as one.
        magnitudes = sample.abs().nan_to_num(nan=math.inf, posinf=math.inf)
        dropped = magnitudes.numel() - round(self.kept_target * magnitudes.numel())
        if dropped == 0:
            return 0.0
        largest_dropped = magnitudes.kthvalue(dropped).values.item()
        return min(largest_dropped, torch.finfo(x.dtype).max)

    def _step(self, numel: int) -> int:
        """Distance between sampled elements: odd and without a common factor with the tensor's size.

        A step that shares a factor with the number of channels or pixels would meet only some of them.
        """
        step = max(numel // self.sample, 1)
        while step > 1 and (step % 2 == 0 or math.gcd(step, numel) > 1):
            step -= 1
        return step
