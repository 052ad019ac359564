"""`fedmef-fx fit`: a pretrained model to an ONNX file within limits."""

import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch.utils.data import Dataset, TensorDataset

import fedmef_fx
from fedmef_fx.commands.arguments import ModelName, build_model
from fedmef_fx.commands.command import AsJson, Result, command, progress_bar
from fedmef_fx.commands.training_data import Data, load_data
from fedmef_fx.commands.weights import load_weights
from fedmef_fx.errors import DataError
from fedmef_fx.fitting.files import FORMS

__all__ = ["fit"]


@command
def fit(  # noqa: PLR0913 -- one parameter per option
    *,
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file to write.")],
    data: Annotated[
        str, typer.Option(metavar="DATA", help="digits, cifar10, or an .npz file with the arrays x and y.")
    ],
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The model's state dict: .safetensors, or .pt as torch.save writes it."),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Argument of the model's factory, e.g. num_classes=10; may be repeated."
        ),
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of CIFAR-10's binary version.")] = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Limit of the file, e.g. 400kB.")] = None,
    max_latency: Annotated[float | None, typer.Option(metavar="MS", help="Limit of one call, milliseconds.")] = None,
    form: Annotated[
        list[str] | None, typer.Option(metavar="FORM", help=f"{', '.join(FORMS)}; may be repeated. All if left out.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data for each form.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = 1e-3,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw score over bytes.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the samples.")] = 0,
    as_json: AsJson = False,
) -> Result:
    """Prune, quantise and fine-tune a pretrained model until its file keeps the limits, or say what it misses."""
    network = build_model(model, seed=seed, options=dict(map(_named_value, model_option or [])))
    if weights is not None:
        load_weights(network, weights)
    training, evaluation = _read(data, data_dir)
    with progress_bar("fit", steps=1 + len(form or FORMS)) as bar:
        done = iter(range(1, 1000))
        _, report = fedmef_fx.fit(
            network,
            training,
            evaluation=evaluation,
            max_bytes=max_bytes,
            max_latency_ms=max_latency,
            forms=form or tuple(FORMS),
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            path=output,
            seed=seed,
            on_progress=lambda note: bar.reach(next(done), note),
        )
    if plot is not None:
        report.plot(plot)

    def show(console: Console) -> None:
        console.print(str(report))
        console.print(f"wrote {output}")

    return Result(report.as_dict(), show, is_success=report.fits)


def _named_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(
            f"got {text!r}; expected a name and a value, e.g. num_classes=10", param_hint="--model-option"
        )
    for read in (int, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _read(data: str, directory: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training data, and what files are scored on; None where that is to be held out."""
    if data in list(Data):
        training, evaluation, _ = load_data(Data(data), directory)
        return training, evaluation
    try:
        with np.load(data, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(
            f"--data {data}: cannot be read: {error}; expected digits, cifar10, or an .npz file with the arrays x and y"
        ) from error
    if set(arrays) != {"x", "y"} or len(arrays["x"]) != len(arrays["y"]):
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise DataError(f"--data {data}: holds {shapes}; expected x [samples, ...] and y [samples, ...]")
    tensors = [
        torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
        for array in (arrays["x"], arrays["y"])
    ]
    return TensorDataset(*tensors), None
