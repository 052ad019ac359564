"""Time of the packing kernels against a plain copy: nanoseconds per element, for every backend and number of threads.

    python benchmarks/packing.py [--elements 4194304] [--kept 0.1] [--repeats 15] [--threads 1 2] [--docs FILE]

A cell is the median over the repeats with half of the interquartile range after it: with one thread of processor time,
which other programs do not lengthen, with several of elapsed time. "first" is the first call of a backend's
kernels together, compilation and imports included; "memory" is what the resident set of the process grew by in them.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _docs import fill
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedmef_fx.packing import (
    BlockCode,
    BlockwiseTensor,
    ThresholdEstimator,
    available_backends,
    backend,
    block_operations,
    using_backend,
)
from fedmef_fx.packing.fused import fused_kernels

CODES = {
    "2 bits": BlockCode(bits=2),
    "2 bits, stochastic": BlockCode(bits=2, rounding="stochastic"),
    "4 bits, stochastic": BlockCode(bits=4, rounding="stochastic"),
    "8 bits": BlockCode(),
    "1 bit, centroids": BlockCode(bits=1, levels="centroids"),
    "2 bits, centroids": BlockCode(bits=2, levels="centroids"),
}


def resident_bytes() -> int:
    """Resident set size of this process; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def timed(call: Callable[[], object], *, repeats: int, elements: int) -> str:
    """Median and interquartile range of a call, as text."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    call()
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append((clock() - start) / elements * 1e9)
    low, median, high = statistics.quantiles(times, n=4)
    return f"{median:.2f} ±{(high - low) / 2:.2f}"


def kernels(name: str, x: Tensor, threshold: float) -> dict[str, Callable[[], object]]:
    """The calls to be timed, by name."""
    chosen = backend(name)  # type: ignore[arg-type]  # a name from available_backends
    out = torch.empty_like(x)
    bitmap, values = chosen.pack(x, threshold)
    bits = chosen.clamp_bits(x, out=out)
    return {
        "pack": lambda: chosen.pack(x, threshold),
        "unpack": lambda: chosen.unpack(bitmap, values, out=out),
        "gather": lambda: chosen.gather(bitmap, x),
        "clamp_bits": lambda: chosen.clamp_bits(x, out=out),
        "mask_by_bits": lambda: chosen.mask_by_bits(bits, x, out=out),
        "mask, slope 0.1": lambda: chosen.mask_by_bits(bits, x, out=out, scale_off=0.1),
        **{label: call for text, code in CODES.items() for label, call in code_kernels(name, x, code, text).items()},
    }


def code_kernels(name: str, x: Tensor, code: BlockCode, text: str) -> dict[str, Callable[[], object]]:
    """Coding a tensor, and decoding it into one that is there."""
    out = torch.empty_like(x)
    with using_backend(name):  # type: ignore[arg-type]  # a name from available_backends
        kernels = fused_kernels(x, code) or block_operations
        kept = BlockwiseTensor.encode(x, code, key=1)

    def pack() -> None:
        with using_backend(name):  # type: ignore[arg-type]
            BlockwiseTensor.encode(x, code, key=1)

    return {
        f"{text}: pack": pack,
        f"{text}: unpack": lambda: kernels.unpack_blocks(kept.codes, code, kept.ranges, out),
    }


def markdown(measured: dict[int, dict[str, dict[str, str]]], caption: str) -> str:
    """The best backend's figures for each number of threads, and the reference's for the first.

    Args:
        measured: By threads, backend and kernel.
        caption: What was measured where.
    """
    first = next(iter(measured.values()))
    best, *_, reference = (name for name in first if name != "copy")
    head = ["kernel", *(f"{best}, {threads} thread(s)" for threads in measured), f"{reference}, {next(iter(measured))}"]
    rows = [head, ["---"] * len(head)]
    rows += [
        [label, *(columns[best][label] for columns in measured.values()), first[reference][label]]
        for label in first[best]
    ]
    rows.append(["a copy", *(columns["copy"]["copy"] for columns in measured.values()), ""])
    return "\n".join([f"Nanoseconds per element, {caption}.", "", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=4 * 1024 * 1024, help="size of the float32 tensor")
    parser.add_argument("--kept", type=float, default=0.1, help="share of elements that are kept")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--docs", type=Path, help="a page with marks for the table, which is filled in")
    options = parser.parse_args()

    console = Console()
    system = (
        f"{processor()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )
    console.print(system)
    x = torch.randn(options.elements, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    threshold = ThresholdEstimator(kept_target=options.kept).threshold(x)

    first = {}
    for name in available_backends():
        memory, start = resident_bytes(), time.perf_counter()
        # Small tensors, so that the memory is that of the backend.
        for call in kernels(name, x[:1000].clone(), threshold).values():
            call()
        first[name] = f"{time.perf_counter() - start:.2f} s, {(resident_bytes() - memory) / 1e6:.0f} MB"

    measured: dict[int, dict[str, dict[str, str]]] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        columns = {
            name: {
                label: timed(call, repeats=options.repeats, elements=options.elements)
                for label, call in kernels(name, x, threshold).items()
            }
            for name in available_backends()
        }
        copy = timed(lambda: out.copy_(x), repeats=options.repeats, elements=options.elements)
        title = (
            f"ns per element, {options.elements:,} float32, {options.kept:.0%} kept, {threads} thread(s); copy {copy}"
        )
        table = Table("kernel", *columns, title=title)
        for label in next(iter(columns.values())):
            table.add_row(label, *(column[label] for column in columns.values()))
        table.add_section()
        table.add_row("first, memory", *first.values())
        console.print(table)
        measured[threads] = {**columns, "copy": {"copy": copy}}
    if options.docs:
        fill(options.docs, "packing", markdown(measured, f"{system}; {options.elements:,} float32"))


if __name__ == "__main__":
    main()
