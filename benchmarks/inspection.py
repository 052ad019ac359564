"""What looking at a model takes: text, page, bytes, and the time until a browser shows the page.

python benchmarks/inspection.py [--model resnet50] [--runs 5]

`text` is `str(inspect(model))`, `page` is `inspect(model, (x,)).to_html(path)` with the original's graphs, both of a
transformed model. First paint is Chromium's first contentful paint, from the start of loading the file; left out where
there is no Chromium.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table

from fedmef_fx import inspect, transform
from fedmef_fx.commands.arguments import example_input
from fedmef_fx.models import REFERENCE_MODELS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # tests are no part of the installed package

from browser import Browser, NoBrowserError

_PAINT = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = REFERENCE_MODELS[options.model]()
    sparse, x = transform(model), example_input(options.model, None)
    table = Table("what", "median", "min", "max", title=f"inspecting {options.model}; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        _add(table, "text, s", [_seconds(lambda: str(inspect(sparse))) for _ in range(options.runs)])
        pages = [_seconds(lambda: inspect(sparse, (x,)).to_html(page)) for _ in range(options.runs)]
        _add(table, "page with example inputs, s", pages)
        table.add_row("page, MB", f"{page.stat().st_size / 1e6:.3f}")
        try:
            _add(table, "first paint, s", _paints(page, options.runs))
        except NoBrowserError as error:
            table.add_row("first paint, s", "-", "", str(error))
    Console().print(table)


def _add(table: Table, what: str, values: list[float]) -> None:
    table.add_row(what, f"{statistics.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _paints(page: Path, runs: int) -> list[float]:
    browser = Browser()
    try:
        return [_paint(browser, page) for _ in range(runs)]
    finally:
        browser.close()


def _paint(browser: Browser, page: Path) -> float:
    browser.open(page)
    browser.wait(lambda: bool(browser.run(_PAINT)))
    return float(browser.run(_PAINT)[0]) / 1000


if __name__ == "__main__":
    main()
