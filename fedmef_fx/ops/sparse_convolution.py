"""Two-dimensional convolutions by their active weights alone, as products of a sparse matrix with shifted rows.

Of each channel, all images of a batch lie one after the other in one row, with zeros around each:

    out[o][q] = bias[o] + sum over active (o, c, i, j) of w[o, c, i, j] * x[c][q + i * columns + j]

for every q, also for those between the results, which are dropped. With a stride s, a channel has s * s rows, one for
each place of a pixel within the steps of the kernel, so that a step is always one element. Zeros are shared: those to
the right of a row of pixels are also those to the left of the next one. The gradient of the input is the same product
with the transposed matrix and shifts the other way, and that of a weight the inner product of the two rows it connects.

Images are laid out a few at a time: the buffers stay in the second-level cache, and are small (`room_for_copies`).
"""

import dataclasses
import functools
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmef_fx.native import call, threads_for
from fedmef_fx.ops.sparse_matrix import Rows, SparseMatrix
from fedmef_fx.packing.backend_native import FORMATS
from fedmef_fx.packing.layout import has_no_values
from fedmef_fx.packing.sample_parts import KeptSamples, samples_of

__all__ = ["Geometry", "PackedConvolution", "RowLayout", "room_for_copies", "row_layout"]

Pair = tuple[int, ...]
Numbers = NDArray[np.int32]


class Geometry(NamedTuple):
    """A convolution of one group without its weight; height and width each.

    Attributes:
        stride: Steps of the kernel.
        padding: Zeros on both sides.
        dilation: Spacing of the kernel.
    """

    stride: Pair
    padding: Pair
    dilation: Pair


# Elements that every processor's vectors divide.
_VECTOR: Final = 16
# Elements of the buffers that images are laid out in, at most: they stay in the second-level cache.
_BUFFER: Final = 1 << 19


@dataclasses.dataclass(frozen=True, slots=True)
class _Axis:
    """Rows of pixels, or pixels of a row, as taps of a kernel see them.

    Attributes:
        out: Size of the result.
        size: Places per image.
        phases: What taps leave when divided by the stride.
        taps: Of each tap, the index of its phase, and how many steps it is from the first.
    """

    out: int
    size: int
    phases: tuple[int, ...]
    taps: tuple[Pair, ...]

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, padding: int, dilation: int) -> "_Axis":
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        phases = tuple(sorted({k * dilation % stride for k in range(kernel)}))
        taps = tuple((phases.index(k * dilation % stride), k * dilation // stride) for k in range(kernel))
        most = max(steps for _, steps in taps)
        left = min(max(0, -(-(padding - phase) // stride)) for phase in phases)
        right = min(max(0, out + most + (size + padding - phase) // -stride) for phase in phases)
        return cls(out, out + most - min(left, right, most), phases, taps)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RowLayout:
    """How images of one size are laid out for one kernel.

    Attributes:
        out_size: Height and width of the result.
        planes: Rows of a channel, [planes, 2]: the phases that they hold.
        rows: Rows of pixels per image, zeros included.
        columns: Pixels of a row.
        plane: Of each column of the weight matrix, the plane of its channel: [in * height * width].
        shift: Of each column, how far behind the result its pixel stands.
        reach: The largest shift.
    """

    out_size: Pair
    planes: Numbers
    rows: int
    columns: int
    plane: Numbers
    shift: Numbers
    reach: int

    @property
    def size(self) -> int:
        """Elements per image and plane."""
        return self.rows * self.columns

    def image_size(self, shape: torch.Size) -> int:
        """Elements that one image and its result take, for a weight of a shape."""
        return (shape[0] + shape[1] * len(self.planes)) * self.size


@functools.lru_cache(maxsize=256)
def row_layout(shape: torch.Size, size: Pair, geometry: Geometry) -> RowLayout:
    """The layout for a weight of a shape `[out, in, height, width]` and images of a size."""
    vertical, horizontal = (_Axis.of(*axis) for axis in zip(size, shape[2:], *geometry, strict=True))
    width = len(horizontal.phases)
    planes = [[a, b] for a in vertical.phases for b in horizontal.phases]
    taps = [(a * width + b, u * horizontal.size + v) for a, u in vertical.taps for b, v in horizontal.taps]
    channels = np.arange(shape[1], dtype=np.int32)[:, None]
    return RowLayout(
        out_size=(vertical.out, horizontal.out),
        planes=np.array(planes, dtype=np.int32),
        rows=vertical.size,
        columns=horizontal.size,
        plane=(channels * len(planes) + np.array([plane for plane, _ in taps], dtype=np.int32)).reshape(-1),
        shift=np.tile(np.array([shift for _, shift in taps], dtype=np.int32), shape[1]),
        reach=max(shift for _, shift in taps),
    )


def room_for_copies(shape: torch.Size, x_shape: torch.Size) -> int:
    """Elements that a sparse product may copy: what the dense weight would take, or a 16th of the input."""
    return max(shape.numel(), x_shape.numel() // 16)


class PackedConvolution:
    """The weight of a convolution of one group, as a sparse matrix.

    Args:
        values: What to multiply by, [active].
        bitmap: Where they stand, uint8, in row-major order.
        shape: Of the dense weight, [out, in, height, width].
        geometry: Of the convolution.
    """

    def __init__(self, values: Tensor, bitmap: Tensor, shape: torch.Size, geometry: Geometry) -> None:
        self._matrix = SparseMatrix.of(values, bitmap, rows=shape[0], width=shape[1:].numel())
        self._shape, self._geometry = shape, geometry

    def forward(self, x: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
        """The convolution of x, [N, in, height, width], over x where that is allowed: images are laid out first."""
        images = self._images(x.shape)
        matrix = self._matrix.placed(_tensor(images.places, x), images.pixels.count)
        out = x if inplace else x.new_empty(x.shape[0], self._shape[0], *images.layout.out_size)
        for part in images.parts:
            matrix.multiply(images.pixels.lay_out(x[part]), images.results.of(out[part]), bias)
            images.results.take_back(out[part])
        return out

    def input_gradient(self, grad: Tensor, x_shape: torch.Size, *, inplace: bool = False) -> Tensor:
        """Gradient of the input, of its shape, from that of the result, and over that where it is allowed."""
        images = self._images(x_shape)
        layout, grad = images.layout, grad.contiguous()
        tables = (_tensor(table, grad) for table in (layout.plane, layout.shift))
        matrix = self._matrix.by_columns(images.pixels.count, images.distance, *tables)
        grad_x = grad if inplace else grad.new_empty(x_shape)
        for part in images.parts:
            matrix.multiply(images.results.lay_out(grad[part]), images.pixels.of(grad_x[part]))
            images.pixels.take_back(grad_x[part])
        return grad_x

    def weight_gradient(self, grad: Tensor, x: Tensor | KeptSamples) -> Tensor:
        """Gradient of the values, [active], from that of the result and what was kept of the input."""
        images, grad = self._images(x.shape), grad.contiguous()
        matrix = self._matrix.placed(_tensor(images.places, grad), images.pixels.count)
        out = torch.zeros_like(matrix.values)
        for place, some in samples_of(x, multiple=images.together):
            decoded, own = some.detach().contiguous(), grad[place]
            for part in images.parts[: -(-len(own) // images.together)]:
                matrix.add_inner_products(images.results.lay_out(own[part]), images.pixels.lay_out(decoded[part]), out)
            del some, decoded  # or they would live until the next ones are there
        return out

    def _images(self, x_shape: torch.Size) -> "_Images":
        layout = row_layout(self._shape, x_shape[2:], self._geometry)
        return _Images(layout, self._shape, x_shape, self._geometry, self._matrix.values)


def _tensor(numbers: Numbers, like: Tensor) -> Tensor:
    """A table for a kernel, int32; without values beside a tensor that has none."""
    if has_no_values(like):
        return like.new_empty(numbers.shape, dtype=torch.int32, requires_grad=False)
    return torch.from_numpy(numbers)


def _whole_vectors(length: int) -> int:
    """Rows without a rest: it would be worked on element by element."""
    return -(-length // _VECTOR) * _VECTOR


class _Images:
    """A few images of a batch at a time, laid out in buffers that are used again for the next ones.

    Attributes:
        layout: How.
        pixels: The side of the input.
        results: The side of the result.
        distance: From one row to the next.
        together: How many images are taken together.
        parts: Which.
    """

    def __init__(
        self, layout: RowLayout, shape: torch.Size, x_shape: torch.Size, geometry: Geometry, like: Tensor
    ) -> None:
        most = max(1, min(_BUFFER, room_for_copies(shape, x_shape)) // layout.image_size(shape))
        together = -(-x_shape[0] // -(-x_shape[0] // most))  # all parts of about the same size
        self.layout, self.distance, self.together = layout, _whole_vectors(together * layout.size), together
        # Where no tensor has values, memory is being predicted: the first part takes what each of the others does.
        images = together if has_no_values(like) else x_shape[0]
        self.parts = [slice(start, start + together) for start in range(0, images, together)]
        self.pixels = _Side(
            _Planes(layout.planes, geometry.stride, geometry.padding), shape[1], layout, self.distance, like, reach=0
        )
        self.results = _Side(_RESULTS, shape[0], layout, self.distance, like, reach=layout.reach)

    @property
    def places(self) -> Numbers:
        """Where the dense row of each column of the matrix begins."""
        return self.layout.plane * np.int32(self.distance) + self.layout.shift


class _Planes(NamedTuple):
    """Which pixels make the rows of a channel.

    Attributes:
        phases: As `RowLayout.planes`.
        stride: Between pixels.
        padding: Zeros that count as pixels.
    """

    phases: Numbers
    stride: Pair
    padding: Pair


_RESULTS: Final = _Planes(np.zeros((1, 2), dtype=np.int32), (1, 1), (0, 0))


class _Side:
    """The rows of the input, or of the result, of some images.

    Args:
        planes: Of each channel.
        channels: Number of channels.
        layout: Of the images.
        distance: From one row to the next.
        like: Of the type of the images.
        reach: How far in front of a place products look; those of the input look behind it.
    """

    def __init__(
        self, planes: _Planes, channels: int, layout: RowLayout, distance: int, like: Tensor, *, reach: int
    ) -> None:
        self.count = channels * len(planes.phases)
        self._planes, self._layout = planes, layout
        size, behind = self.count * distance, layout.reach - reach
        buffer = like.new_empty(reach + size + behind)
        if not has_no_values(like):
            buffer[:reach], buffer[reach + size :] = 0, 0
        self._rows = Rows(buffer, self.count, distance, distance, first=reach, reach=(reach, behind))
        self._of: dict[int, Rows] = {}
        self._phases = _tensor(planes.phases, like)

    def of(self, x: Tensor) -> Rows:
        """The rows for so many images as `x` `[images, channels, height, width]` has."""
        rows = self._of.get(x.shape[0])  # of all parts of a batch but the last one they are the same
        if rows is None:
            rows = dataclasses.replace(self._rows, length=_whole_vectors(x.shape[0] * self._layout.size))
            self._of[x.shape[0]] = rows
        return rows

    def lay_out(self, x: Tensor) -> Rows:
        """The rows, filled with images."""
        self._call("lay_out", x, self._rows.start, x)
        return self.of(x)

    def take_back(self, x: Tensor) -> None:
        """Copy images out of the rows."""
        self._call("take_back", self._rows.start, x, x)

    def _call(self, kernel: str, source: Tensor, target: Tensor, x: Tensor) -> None:
        call(
            kernel,
            FORMATS[x.dtype],
            source,
            self._phases,
            len(self._planes.phases),
            *x.shape,
            *self._planes.stride,
            *self._planes.padding,
            self._layout.rows,
            self._layout.columns,
            self._rows.distance,
            self.of(x).length,
            target,
            threads_for(x.numel()),
        )
