"""`fedmef-fx bench`: how long a transformation takes, a training step before and after it, and an exported file."""

import statistics
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx.commands.arguments import InputShape, build_model, required_input, sizes_of
from fedmef_fx.commands.bench_onnx import bench_onnx, show_onnx
from fedmef_fx.commands.command import AsJson, Result, command, progress_bar
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.reference import masked_dense_reference
from fedmef_fx.commands.tables import show_table
from fedmef_fx.config import Config

__all__ = ["bench"]


class Subject(StrEnum):
    """What to time."""

    ALL = "all"
    TRANSFORM = "transform"
    STEP = "step"
    ONNX = "onnx"


@command
@takes_config()
def bench(  # noqa: PLR0913 -- one parameter per option
    *,
    what: Annotated[
        Subject, typer.Argument(help="The transformation, a training step, or both; onnx: an exported file.")
    ] = Subject.ALL,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As for the other commands; for onnx the file.")
    ] = "digits_cnn",
    input_shape: InputShape = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size, where --input does not give one.", show_default="64; 1 for onnx"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each thing is timed.")] = 15,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For onnx: another file to time in turns with the first.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="For onnx: threads of onnxruntime.")] = 1,
    warmup: Annotated[int, typer.Option(min=0, help="For onnx: runs that do not count.")] = 3,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="For onnx: a size that varies; may be repeated.")
    ] = None,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Time the transformation, and a training step against the same masks on dense activations and BatchNorm.

    `bench onnx FILE` times an exported file in onnxruntime: to load it, and per run.

    Steps of both are interleaved and medians compared, so that a machine that slows down slows both.
    """
    if what is Subject.ONNX:
        measured = bench_onnx(
            [Path(model), *([against] if against is not None else [])],
            sizes={"batch": batch or 1, **_named_sizes(size or [])},
            shape=None if input_shape is None else sizes_of(input_shape),
            threads=threads,
            warmup=warmup,
            runs=repeats,
        )
        return Result(measured, lambda console: show_onnx(console, measured))
    network = build_model(model, seed=config.seed)
    data: dict[str, Any] = {"model": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if what is not Subject.STEP:
        data["transform"] = _spread(_timed({"": lambda: fedmef_fx.transform(network, config)}, repeats)[""])
    if what is not Subject.TRANSFORM:
        x = required_input(model, input_shape, batch=batch or 64)
        steps = {
            "step": _training_step(fedmef_fx.transform(network, config), x),
            "step_masked_dense": _training_step(masked_dense_reference(network, config), x),
        }
        times = _timed(steps, repeats)
        data |= {name: _spread(seconds) for name, seconds in times.items()}
        data["step_ratio"] = statistics.median(times["step"]) / statistics.median(times["step_masked_dense"])
        data["input"] = list(x.shape)
    return Result(data, lambda console: _show(console, data))


def _named_sizes(texts: list[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal() or int(number) < 1:
            raise typer.BadParameter(f"got {text!r}; expected a name and a size, e.g. length=16", param_hint="--size")
        sizes[name] = int(number)
    return sizes


def _training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One step of SGD on a fixed batch."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def _timed(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns after one call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with progress_bar("timing", steps=repeats + 1) as bar:
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)
            bar.reach(repeat + 1)
    return seconds


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def _show(console: Console, data: dict[str, Any]) -> None:
    labels = {"transform": "transform", "step": "step, transformed", "step_masked_dense": "step, masked-dense"}
    rows = [
        (label, *(f"{data[name][key] * 1e3:.1f} ms" for key in ("median", "min", "max")))
        for name, label in labels.items()
        if name in data
    ]
    title = f"{data['model']}, torch {data['torch']}, {data['threads']} threads"
    show_table(console, ("", "median", "min", "max"), rows, title=title, numbers=frozenset({1, 2, 3}))
    if "step_ratio" in data:
        console.print(f"step time ratio {data['step_ratio']:.3f}")
