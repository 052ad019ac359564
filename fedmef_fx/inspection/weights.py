"""Weights as they were when a model was inspected: values, mask, and what is drawn from them.

A snapshot is cheap: the active values and one bit per weight. Histograms and pictures are computed when someone asks.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import is_transformed, transformation_of

__all__ = ["Histogram", "Picture", "WeightRecord", "record_weights"]

_LARGEST_COPY: Final = 2**16
"""Values kept of a weight without a mask; of larger ones an evenly spaced sample."""


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each of equally wide bins.

    Attributes:
        low: Left edge of the first bin.
        high: Right edge of the last one.
        counts: Values per bin.
    """

    low: float
    high: float
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """A mask as a picture: output channels from top to bottom, inputs and kernel positions from left to right.

    Attributes:
        rows: Output channels.
        columns: Inputs per output channel, e.g. in/groups x kh x kw.
        row_step: Output channels that one row of pixels stands for.
        column_step: Inputs that one column of pixels stands for.
        levels: uint8 [height, width]: active share of the weights under each pixel, 0 to 255 for 0 to `brightest`.
        brightest: The share that 255 stands for; 1 where each pixel is one weight.
    """

    rows: int
    columns: int
    row_step: int
    column_step: int
    levels: npt.NDArray[np.uint8]
    brightest: float

    @property
    def is_exact(self) -> bool:
        """Whether each pixel is one weight."""
        return self.row_step == 1 and self.column_step == 1


@dataclasses.dataclass(frozen=True, eq=False)
class WeightRecord:
    """One prunable parameter at the moment of inspection.

    Attributes:
        parameter: Its name.
        shape: Its sizes.
        values: float32 [n], its active values; of a large weight without a mask an evenly spaced sample.
        is_sample: Whether `values` is a sample.
        mask_bits: The mask, packed 8 weights to a byte in row-major order; None without a mask.
        adjustment_rate: alpha, the share of active weights that an adjustment at round 0 prunes half of twice over;
            None for a model that is not transformed.
    """

    parameter: str
    shape: tuple[int, ...]
    values: npt.NDArray[np.float32] = dataclasses.field(repr=False)
    is_sample: bool
    mask_bits: bytes | None = dataclasses.field(repr=False)
    adjustment_rate: float | None = None

    def histogram(self, bins: int = 48) -> Histogram | None:
        """The distribution of the finite values, symmetric around 0; None where there are none."""
        finite = self.values[np.isfinite(self.values)]
        if not finite.size:
            return None
        reach = float(np.abs(finite).max()) or 1.0
        counts = torch.histc(torch.from_numpy(finite), bins=bins, min=-reach, max=reach)
        return Histogram(-reach, reach, tuple(int(count) for count in counts))

    def threshold(self) -> float | None:
        """Magnitude below which the next adjustment prunes, if it were that of round 0.

        k = floor(alpha/2 * (1 + cos 0) * n) = floor(alpha * n) of n active weights are pruned then; None where nothing
        would be, and for weights without a mask.
        """
        if self.mask_bits is None or self.adjustment_rate is None:
            return None
        k = math.floor(self.adjustment_rate * self.values.size)
        return float(np.partition(np.abs(self.values), k - 1)[k - 1]) if k else None

    def picture(self, max_pixels: int, *, max_width: int = 1024) -> Picture | None:
        """The mask as a picture of at most `max_pixels`, each pixel a block of weights where there are more.

        Args:
            max_pixels: Height times width, at least 64.
            max_width: Of the picture.

        Returns:
            The picture; None without a mask, or for an empty one.
        """
        if self.mask_bits is None or not math.prod(self.shape):
            return None
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        bits = np.unpackbits(np.frombuffer(self.mask_bits, np.uint8), count=rows * columns).reshape(rows, columns)
        row_step, column_step = _steps(rows, columns, max_pixels, max_width)
        if row_step == column_step == 1:
            return Picture(rows, columns, 1, 1, bits * np.uint8(255), 1.0)
        # Rows first: they are added whole, which is fast; columns of what is left then cost little.
        row_edges, column_edges = np.arange(0, rows, row_step), np.arange(0, columns, column_step)
        active = np.stack([bits[at : at + row_step].sum(axis=0, dtype=np.uint16) for at in row_edges])
        active = np.add.reduceat(active, column_edges, axis=1, dtype=np.uint32)
        sizes = np.outer(_sizes(row_edges, rows), _sizes(column_edges, columns))
        share = active / sizes
        brightest = float(share.max()) or 1.0
        return Picture(
            rows, columns, row_step, column_step, np.rint(share / brightest * 255).astype(np.uint8), brightest
        )


def _steps(rows: int, columns: int, max_pixels: int, max_width: int) -> tuple[int, int]:
    """Weights per pixel, downwards and sideways: as square a block as keeps the picture small enough."""
    column_step = -(-columns // max_width)
    row_step = 1
    while -(-rows // row_step) * -(-columns // column_step) > max_pixels:
        # Shrink the longer side of the picture.
        if rows / row_step > columns / column_step:
            row_step += 1
        else:
            column_step += 1
    return row_step, column_step


def _sizes(edges: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    return np.diff(np.append(edges, total))


@torch.no_grad()
def record_weights(model: nn.Module, names: Iterable[str]) -> tuple[WeightRecord, ...]:
    """Snapshots of parameters.

    Args:
        model: Transformed or not; it is only read.
        names: Of the parameters.
    """
    masked = masked_parameters(model) if is_transformed(model) else {}
    rate = transformation_of(model).config.adjustment_rate if masked else None
    records = []
    for name in names:
        weight = model.get_parameter(name).detach()
        values = weight.to(device="cpu", dtype=torch.float32).numpy().reshape(-1)
        shape = tuple(weight.shape)
        if name in masked:
            parameter = masked[name]
            mask, shape = parameter.mask.cpu().numpy().reshape(-1), tuple(parameter.shape)
            bits = np.packbits(mask).tobytes()
            values = values.copy() if parameter.is_packed else values[mask]
            records.append(WeightRecord(name, shape, values, is_sample=False, mask_bits=bits, adjustment_rate=rate))
        else:
            step = -(-values.size // _LARGEST_COPY) or 1
            copied = values[::step].copy()
            records.append(WeightRecord(name, shape, copied, is_sample=step > 1, mask_bits=None))
    return tuple(records)
