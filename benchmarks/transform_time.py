"""Seconds that `transform` takes without example inputs, and what of it each pass takes.

python benchmarks/transform_time.py [--model resnet50] [--runs 5]
"""

import argparse
import statistics
import time

from _machine import machine
from rich.console import Console
from rich.table import Table

from fedmef_fx import report, transform
from fedmef_fx.models import REFERENCE_MODELS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    model = REFERENCE_MODELS[options.model]()
    seconds: list[float] = []
    passes: dict[str, list[float]] = {}
    for _ in range(options.runs):
        start = time.perf_counter()
        sparse = transform(model)
        seconds.append(time.perf_counter() - start)
        for result in report(sparse):
            passes.setdefault(result.name.partition("{")[0], []).append(result.seconds)
    table = Table("part", "median s", "min s", "max s", title=f"transform({options.model}); {machine()}")
    for name, values in {"all (first call included)": seconds, **passes}.items():
        table.add_row(name, f"{statistics.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
