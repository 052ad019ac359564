"""`fedmef-fx bench`: how long a transformation takes, and a training step before and after it."""

import statistics
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command, progress_bar
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.models import InputShape, build_model, required_input
from fedmef_fx.commands.tables import show_table
from fedmef_fx.commands.twin import masked_dense_twin
from fedmef_fx.config import Config

__all__ = ["bench"]


class Subject(StrEnum):
    """What to time."""

    ALL = "all"
    TRANSFORM = "transform"
    STEP = "step"


@command
@takes_config()
def bench(
    *,
    what: Annotated[Subject, typer.Argument(help="The transformation, a training step, or both.")] = Subject.ALL,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for the other commands.")] = "digits_cnn",
    input_shape: InputShape = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size, where --input does not give one.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often each thing is timed.")] = 15,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Time the transformation, and a training step against the same masks on dense activations and BatchNorm.

    Steps of both are interleaved and medians compared, so that a machine that slows down slows both.
    """
    network = build_model(model, seed=config.seed)
    data: dict[str, Any] = {"model": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if what is not Subject.STEP:
        data["transform"] = _spread(_timed({"": lambda: fedmef_fx.transform(network, config)}, repeats)[""])
    if what is not Subject.TRANSFORM:
        x = required_input(model, input_shape, batch=batch)
        steps = {
            "step": _training_step(fedmef_fx.transform(network, config), x),
            "step_masked_dense": _training_step(masked_dense_twin(network, config), x),
        }
        times = _timed(steps, repeats)
        data |= {name: _spread(seconds) for name, seconds in times.items()}
        data["step_ratio"] = statistics.median(times["step"]) / statistics.median(times["step_masked_dense"])
        data["input"] = list(x.shape)
    return Result(data, lambda console: _show(console, data))


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
