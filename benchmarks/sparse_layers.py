"""Layers with packed weights: by their active weights alone, against dense products.

    python benchmarks/sparse_layers.py [--batch 8] [--density 0.4 0.2 0.1 0.05] [--runs 15]

Layers of MobileNetV2 and ResNet18 for 32x32 images. "forward", "input" and "weight" are the result and the two
gradients, each with all that it takes besides the product: indices from the bitmap, the transposed matrix, images laid
out in rows. Dense is the fastest that torch offers for a dense weight that is there already. One thread, taken in
turns; times are medians of CPU time, and the ratio is that of the medians. "chosen" is what the cost model of
`ops/sparse_ways.py` takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedmef_fx.ops.layers import ConvolutionGeometry
from fedmef_fx.ops.pointwise import PackedMatrix
from fedmef_fx.ops.sparse_convolution import Geometry, PackedConvolution
from fedmef_fx.ops.sparse_ways import SparseWay, convolution_way
from fedmef_fx.packing import using_backend
from fedmef_fx.packing.bitmap import pack_bits

LAYERS = [
    (24, 144, 1, 1, 32),
    (64, 384, 1, 1, 8),
    (160, 960, 1, 1, 4),
    (64, 64, 3, 1, 32),
    (64, 128, 3, 2, 32),
    (128, 128, 3, 1, 16),
    (256, 256, 3, 1, 8),
    (256, 512, 3, 2, 8),
    (512, 512, 3, 1, 4),
]
"""Input channels, output channels, kernel, stride, height and width."""


def medians(works: list[Callable[[], Tensor]], runs: int) -> list[float]:
    """CPU seconds of each; all run in turns."""
    seconds: list[list[float]] = [[] for _ in works]
    for run in range(runs + 2):  # the first two warm up
        for index, work in enumerate(works):
            start = time.process_time()
            work()
            if run > 1:
                seconds[index].append(time.process_time() - start)
    return [statistics.median(each) for each in seconds]


def measure(layer: tuple[int, int, int, int, int], density: float, batch: int, runs: int) -> list[str]:
    """A row of the table."""
    inputs, outputs, kernel, stride, size = layer
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    dense = ConvolutionGeometry(*geometry, transposed=False, output_padding=(0, 0), groups=1)
    mask = torch.rand(outputs, inputs, kernel, kernel) < density
    weight = torch.randn(mask.shape) * mask
    values, bitmap = weight[mask], pack_bits(mask)
    x = torch.randn(batch, inputs, size, size)
    grad = torch.randn_like(dense.forward(x, weight, None))

    def sparse() -> SparseWay:
        if kernel == stride == 1:
            return PackedMatrix(values, bitmap, weight.shape)
        return PackedConvolution(values, bitmap, weight.shape, geometry)

    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = [
        (lambda: dense.forward(x, weight, None), lambda: sparse().forward(x, None)),
        (lambda: dense.input_gradient(grad, x.shape, weight), lambda: sparse().input_gradient(grad, x.shape)),
        (
            lambda: dense.parameter_gradients(grad, x, lambda: weight, has_bias=False)[0],
            lambda: sparse().weight_gradient(grad, x),
        ),
    ]
    row = [f"{inputs} -> {outputs}, {kernel} x {kernel} / {stride}, {size} x {size}", f"{density:g}"]
    for dense_work, sparse_work in pairs:
        theirs, ours = medians([dense_work, sparse_work], runs)
        row.append(f"{theirs * 1e3:.2f} / {ours * 1e3:.2f} = {theirs / ours:.1f}")
    return [*row, "sparse" if convolution_way(x, values.numel(), weight.shape, geometry) else "dense"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--density", type=float, nargs="+", default=[0.4, 0.2, 0.1, 0.05])
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with using_backend("native"):
        table = Table(title=f"batch {options.batch}, ms dense / sparse = times faster; {machine()}")
        for column in ("layer", "density", "forward", "input", "weight", "chosen"):
            table.add_column(column, justify="right")
        for layer in LAYERS:
            for density in options.density:
                table.add_row(*measure(layer, density, options.batch, options.runs))
            table.add_section()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
