"""Decoding a few samples of a kept tensor at a time, so that all of it is never dense at once."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.packing.codecs import KeptTensor

__all__ = ["KeptSamples", "samples_of", "samples_together"]

# Parts of fewer elements take longer than they save.
_SMALLEST: Final = 1 << 16
_PARTS: Final = 16


def samples_together(shape: torch.Size, *, multiple: int = 1, least: int = 0) -> int:
    """How many samples of a batch make a part: a sixteenth of a large batch, all of a small one.

    Args:
        shape: Of the batch, `[samples, ...]`.
        multiple: What the number is to be divided by, where there is more than one part.
        least: Elements of a part, at least: as many as a dense weight has that each part reads again.
    """
    numel = shape.numel()
    if not numel:
        return shape[0]
    size = max(-(-numel // _PARTS), _SMALLEST, least)
    together = -(-size // (numel // shape[0]) // multiple) * multiple
    return min(max(together, multiple), shape[0])


@dataclasses.dataclass(frozen=True, slots=True)
class KeptSamples:
    """What is kept of a batch.

    Attributes:
        kept: It.
        shape: Of the batch, `[samples, ...]`.
        dtype: To decode to.
    """

    kept: KeptTensor
    shape: torch.Size
    dtype: torch.dtype

    def whole(self) -> Tensor:
        """All samples."""
        return self.kept.unpack().reshape(self.shape).to(self.dtype)

    def parts(self, *, multiple: int = 1, least: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """A few samples after the other, with their place; all at once where that cannot be.

        Args:
            multiple: As of `samples_together`.
            least: As of `samples_together`.
        """
        step = self._step(multiple, least)
        if step is None:
            yield slice(None), self.whole()
            return
        each = self.shape[1:].numel()
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            flat = self.kept.unpack_part(first * each, last * each)
            layout = self.kept.layout
            assert layout is not None  # noqa: S101 -- or there would be no step
            yield slice(first, last), flat.as_strided((last - first, *self.shape[1:]), layout.stride).to(self.dtype)
            del flat  # or it would live until the next one is there

    def _step(self, multiple: int, least: int) -> int | None:
        """Samples per part; None for all at once."""
        grain, layout = self.kept.part_grain, self.kept.layout
        if grain == 0 or layout is None or layout.shape != self.shape or not self.shape.numel():
            return None
        each = self.shape[1:].numel()
        if layout.stride[0] != each:  # samples are interleaved
            return None
        multiple = math.lcm(multiple, grain // math.gcd(grain, each))
        step = samples_together(self.shape, multiple=multiple, least=least)
        return step if step < self.shape[0] else None


def samples_of(x: "Tensor | KeptSamples", *, multiple: int = 1, least: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """A batch part by part, as `KeptSamples.parts`; a tensor in one."""
    if isinstance(x, Tensor):
        yield slice(None), x
    else:
        yield from x.parts(multiple=multiple, least=least)
