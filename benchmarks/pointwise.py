"""Pointwise convolutions with packed weights: by their active weights alone, against dense products.

    python benchmarks/pointwise.py [--batch 8] [--density 0.4 0.2 0.1 0.05] [--runs 15]

Layers of MobileNetV2 for 32x32 images. "forward", "input" and "weight" are the result and the two gradients, each with
all that it takes besides the product: indices from the bitmap, the transposed matrix, small images laid side by side.
Dense is the fastest that torch offers for a dense weight that is there already. One thread, taken in turns; times are
medians of CPU time, and the ratio is that of the medians.
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
from fedmef_fx.packing import using_backend
from fedmef_fx.packing.bitmap import pack_bits

LAYERS = [(24, 144, 32), (192, 32, 16), (64, 384, 8), (576, 96, 8), (160, 960, 4), (320, 1280, 4)]
"""Input channels, output channels, height and width."""
GEOMETRY = ConvolutionGeometry((1, 1), (0, 0), (1, 1), transposed=False, output_padding=(0, 0), groups=1)


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


def measure(layer: tuple[int, int, int], density: float, batch: int, runs: int) -> list[str]:
    """A row of the table."""
    inputs, outputs, size = layer
    mask = torch.rand(outputs, inputs, 1, 1) < density
    weight = torch.randn(mask.shape) * mask
    values, bitmap = weight[mask], pack_bits(mask)
    x, grad = torch.randn(batch, inputs, size, size), torch.randn(batch, outputs, size, size)

    def sparse() -> PackedMatrix:
        return PackedMatrix(values, bitmap, weight.shape)

    pairs: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = [
        (lambda: GEOMETRY.forward(x, weight, None), lambda: sparse().forward(x, None)),
        (lambda: GEOMETRY.input_gradient(grad, x.shape, weight), lambda: sparse().input_gradient(grad)),
        (
            lambda: GEOMETRY.parameter_gradients(grad, x, lambda: weight, has_bias=False)[0],
            lambda: sparse().weight_gradient(grad, x),
        ),
    ]
    row = [f"{inputs} -> {outputs}, {size} x {size}", f"{density:g}"]
    for dense_work, sparse_work in pairs:
        dense, ours = medians([dense_work, sparse_work], runs)
        row.append(f"{dense * 1e3:.2f} / {ours * 1e3:.2f} = {dense / ours:.1f}")
    return row


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
        for column in ("layer", "density", "forward", "input", "weight"):
            table.add_column(column, justify="right")
        for layer in LAYERS:
            for density in options.density:
                table.add_row(*measure(layer, density, options.batch, options.runs))
            table.add_section()
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
