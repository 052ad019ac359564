"""What a training step takes: bytes and time of each method, against masked-dense training with BatchNorm.

    python benchmarks/memory.py [--models resnet18 mobilenet_v2] [--methods masked default ...] [--batch 64] [--runs 5]
        [--no-time] [--json]

Float32, SGD with momentum, density 0.1; all sparse methods share their masks. Peers that trade time or precision for
memory stand beside ours: checkpointing of each residual block, bfloat16 autocast, top-k with int32 indices, 2-bit codes
of all that autograd saves (as in ActNN), and torch.compile with `activation_memory_budget`.

- live peak: the most that is alive in tensors at any moment of a step, see docs/memory.md. Inside compiled code nobody
  sees tensors: there is no such figure of it.
- held: between forward and backward, weights and the batch left out. Of compiled code: what its backward saved.
- RSS growth: resident memory of a fresh process per row, over the process before the model was made, with glibc's mmap
  threshold fixed. It holds what the others miss: workspaces of convolutions, the packing kernels' temporaries. Of
  compiled code: of steps after the compiler has run, and the model, so that the compiler's own memory does not count.
- time: steps of all rows interleaved; median of the ratios to dense training, with their quartiles.

Ratios are to masked-dense. The masked-dense baseline multiplies its weights by the masks after each step, so that it
keeps no second copy of a weight. Its ReLU6 keeps an input of its own in PyTorch: MobileNetV2 has a row without that.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from _machine import machine
from _methods import METHODS, Trainer, applies
from _peers import held_by
from rich.console import Console
from rich.table import Table

from fedmef_fx import memory
from fedmef_fx.measure.resident import (
    ALLOCATOR_SETTINGS,
    forget_peak,
    resident_bytes,
    return_free_memory,
    why_not,
)
from fedmef_fx.packing import available_backends, using_backend

BASELINE = "masked"
SMALL_BATCH = 8


def bytes_of(method: str, model: str, batch: int) -> dict[str, int | None]:
    """The three figures of a row."""
    trainer = Trainer(method, model, batch)
    if trainer.method.is_compiled:
        held = held_by(trainer.loss(trainer.model(trainer.x)), *trainer.tensors())
        return {"peak": None, "held": held, "rss": resident_growth(method, model, batch)}
    report = memory(
        trainer.model,
        (trainer.x,),
        loss=trainer.loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
        micro_batch=trainer.method.micro_batch,
    )
    return {"peak": report.peak, "held": report.saved_total, "rss": resident_growth(method, model, batch)}


def resident_growth(method: str, model: str, batch: int) -> int | None:
    """RSS growth of two steps in a process of its own; None on systems without /proc."""
    if why_not():
        return None
    command = [sys.executable, __file__, "--child", method, "--models", model, "--batch", str(batch)]
    environment = {**os.environ, **ALLOCATOR_SETTINGS}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)  # noqa: S603 -- itself
    return int(done.stdout.split()[-1])


def print_growth(method: str, model: str, batch: int) -> None:
    """What the process of a row does."""
    if METHODS[method].is_compiled:
        print(compiled_growth(Trainer(method, model, batch)))
        return
    warm_up = Trainer(method, model, 2)  # everything that is set up once
    warm_up.step()
    del warm_up
    gc.collect()
    return_free_memory()
    base = resident_bytes()
    trainer = Trainer(method, model, batch)
    gc.collect()
    return_free_memory()
    forget_peak()
    for _ in range(2):
        trainer.step()
    print(resident_bytes("VmHWM") - base)


def compiled_growth(trainer: Trainer) -> int:
    """The growth in steps after the first, which compiles, with the bytes of what was there before them."""
    trainer.step()
    trainer.optimizer.state.clear()
    trainer.optimizer.zero_grad()
    gc.collect()
    return_free_memory()
    base = resident_bytes()
    forget_peak()
    for _ in range(2):
        trainer.step()
    return resident_bytes("VmHWM") - base + sum(tensor.nbytes for tensor in trainer.tensors())


def time_ratios(methods: list[str], model: str, batch: int, runs: int) -> dict[str, list[float]]:
    """Quartiles of the step time of each method over that of the dense model, interleaved."""
    trainers = {method: Trainer(method, model, batch) for method in methods}
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for trainer in trainers.values():
        trainer.step()  # makes the optimizer's state, and compiles what is compiled
    for _ in range(runs):
        for method, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step()
            seconds[method].append(time.perf_counter() - start)
    return {
        method: statistics.quantiles([a / b for a, b in zip(times, seconds["dense"], strict=True)], n=4)
        for method, times in seconds.items()
    }


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every figure of a model."""
    methods = [method for method in options.methods if applies(method, model)]
    rows = {method: {"bytes": bytes_of(method, model, options.batch), "time": {}} for method in methods}
    if options.no_time:
        return rows
    for name in (name for name in available_backends() if name != "torch"):
        with using_backend(name):
            for batch in dict.fromkeys((options.batch, SMALL_BATCH)):
                for method, quartiles in time_ratios(methods, model, batch, options.runs).items():
                    rows[method]["time"][f"{name}, batch {batch}"] = quartiles
    return rows


def show(model: str, rows: dict[str, Any], options: argparse.Namespace) -> None:
    """Print a model's table."""
    table = Table(title=f"{model}, batch {options.batch}, density 0.1; {machine()}")
    table.add_column("method")
    for heading in ("live peak", "ratio", "held", "ratio", "RSS growth", "ratio"):
        table.add_column(heading, justify="right")
    timings = list(next(iter(rows.values()))["time"])
    for heading in timings:
        table.add_column(f"time / dense\n{heading}", justify="right")
    for method, row in rows.items():
        cells = []
        for key in ("peak", "held", "rss"):
            value, base = row["bytes"][key], rows[BASELINE]["bytes"][key]
            cells += ["-", "-"] if value is None else [f"{value / 1e6:.1f} MB", f"{value / base:.3f}"]
        for heading in timings:
            low, median, high = row["time"][heading]
            cells.append(f"{median:.2f} [{low:.2f}, {high:.2f}]")
        table.add_row(METHODS[method].label, *cells)
    Console(width=200).print(table)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help=f"with {BASELINE}")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.methods = [name for name in METHODS if name in options.methods or name in (BASELINE, "dense")]
    if options.child:
        print_growth(options.child, options.models[0], options.batch)
        return
    results = {}
    for model in options.models:
        results[model] = measure(model, options)
        if not options.json:
            show(model, results[model], options)
    if options.json:
        print(json.dumps({"machine": machine(), "batch": options.batch, "models": results}, indent=2))


if __name__ == "__main__":
    main()
