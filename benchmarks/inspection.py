"""What looking at a model takes: text, page, bytes, the time until a browser shows the page, and frames while panning.

python benchmarks/inspection.py [--model resnet50 | t5] [--runs 5]

`text` is `str(inspect(model))`, `page` is `inspect(model, (x,)).to_html(path)` with the original's graphs, both of a
transformed model. First paint is Chromium's first contentful paint, from the start of loading the file. Frames are
counted by `requestAnimationFrame` while the wheel moves the graph: as the page opens it, then with every module open;
Chromium draws at most 60 a second, and without a GPU here. Both are left out where there is no Chromium. `t5` is a T5
of the library transformers, of 2 + 2 blocks.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import nn

from fedmef_fx import inspect, transform
from fedmef_fx.commands.arguments import example_input
from fedmef_fx.models import REFERENCE_MODELS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # tests are no part of the installed package

from browser import Browser, NoBrowserError

_PAINT = "return performance.getEntriesByName('first-contentful-paint').map((entry) => entry.startTime)"
_FRAMES = 180
_PAN = """
const canvas = document.querySelector(".canvas"), [count] = arguments;
window.frames_seen = [];
const step = (now) => {
  const seen = window.frames_seen, turn = seen.length / 15;
  seen.push(now);
  const deltas = { deltaX: 12 * Math.cos(turn), deltaY: 12 * Math.sin(turn) };
  canvas.dispatchEvent(new WheelEvent("wheel", { ...deltas, bubbles: true, cancelable: true }));
  if (seen.length <= count) requestAnimationFrame(step);
};
requestAnimationFrame(step);
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, inputs = _t5() if options.model == "t5" else _reference(options.model)
    sparse = transform(model, **inputs)
    table = Table("what", "median", "min", "max", title=f"inspecting {options.model}; {machine()}")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        _add(table, "text, s", [_seconds(lambda: str(inspect(sparse))) for _ in range(options.runs)])
        pages = [_seconds(lambda: inspect(sparse, **inputs).to_html(page)) for _ in range(options.runs)]
        _add(table, "page with example inputs, s", pages)
        table.add_row("page, MB", f"{page.stat().st_size / 1e6:.3f}")
        try:
            _add_browser(table, page, options.runs)
        except NoBrowserError as error:
            table.add_row("first paint, s", "-", "", str(error))
    Console().print(table)


def _add(table: Table, what: str, values: list[float]) -> None:
    table.add_row(what, f"{statistics.median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _reference(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return REFERENCE_MODELS[name](), {"example_inputs": (example_input(name, None),)}


def _t5() -> tuple[nn.Module, dict[str, Any]]:
    here = str(Path(__file__).resolve().parent)
    sys.path.remove(here)  # where a benchmark has the library's name
    from transformers import T5Config, T5ForConditionalGeneration  # noqa: PLC0415 - only this model needs it

    sys.path.insert(0, here)

    sizes = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, decoder_start_token_id=0)
    tokens = torch.randint(1, 128, (2, 12))
    kwargs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    return T5ForConditionalGeneration(config), {"example_kwargs": kwargs}


def _add_browser(table: Table, page: Path, runs: int) -> None:
    browser = Browser()
    try:
        _add(table, "first paint, s", [_paint(browser, page) for _ in range(runs)])
        for what in ("as it opens", "every module open"):
            if what != "as it opens":
                browser.click("[aria-label='Open every module']")
            boxes = browser.run("return document.querySelectorAll('.item').length")
            times = [_frames(browser) for _ in range(runs)]
            _add(table, f"frames a second, {boxes} boxes, {what}", [1000 / statistics.mean(each) for each in times])
            _add(table, "  a slow one of them (95 %), ms", [statistics.quantiles(each, n=20)[-1] for each in times])
    finally:
        browser.close()


def _frames(browser: Browser) -> list[float]:
    """Milliseconds from frame to frame while the graph moves."""
    browser.run(_PAN, _FRAMES)
    browser.wait(lambda: bool(browser.run("return window.frames_seen.length > arguments[0]", _FRAMES)), seconds=60)
    times = browser.run("return window.frames_seen")
    return [after - before for before, after in itertools.pairwise(times)]


def _paint(browser: Browser, page: Path) -> float:
    browser.open(page)
    browser.wait(lambda: bool(browser.run(_PAINT)))
    return float(browser.run(_PAINT)[0]) / 1000


if __name__ == "__main__":
    main()
