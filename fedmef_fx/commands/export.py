"""`fedmef-fx export`: a model as one ONNX file."""

import inspect as python_inspect
import zipfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import fedmef_fx
from fedmef_fx.commands.arguments import (
    CheckpointOption,
    InputShape,
    ModelName,
    Passes,
    build_model,
    required_input,
    transformed,
)
from fedmef_fx.commands.command import AsJson, Result, command, showing_stages
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.config import Config
from fedmef_fx.errors import DataError

__all__ = ["export"]

_CALIBRATION_BATCH = 16


class Weights(StrEnum):
    """How weights are stored."""

    DENSE = "dense"
    PACKED = "packed"
    PACKED_INT16 = "packed-int16"
    PACKED_FP16 = "packed-fp16"


class Quantize(StrEnum):
    """Kinds of quantization."""

    INT8 = "int8"


class CalibrationMethod(StrEnum):
    """How the range of an activation is taken."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"


class Optimize(StrEnum):
    """What simplifies the graph."""

    NONE = "none"
    ONNXSCRIPT = "onnxscript"
    ONNXSLIM = "onnxslim"


@command
@takes_config()
def export(  # noqa: PLR0913 -- one parameter per option
    *,
    model: ModelName,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The ONNX file to write.")],
    checkpoint: CheckpointOption = None,
    passes: Passes = None,
    input_shape: InputShape = None,
    weights: Annotated[
        Weights, typer.Option(help="How weights are stored: packed files decode themselves when they are loaded.")
    ] = Weights.PACKED,
    quantize: Annotated[
        Quantize | None, typer.Option(help="int8: static quantization; needs --calibration.", show_default="none")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Inputs like those to come: an array [samples, ...] as .npy, or .npz."),
    ] = None,
    calibration_method: Annotated[
        CalibrationMethod, typer.Option(help="How ranges are taken from them; the other two leave out what is rare.")
    ] = CalibrationMethod.MINMAX,
    float32_layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A layer that int8 leaves in float32; may be repeated.", show_default="the costliest"
        ),
    ] = None,
    optimize: Annotated[Optimize, typer.Option(help="What simplifies the graph.")] = Optimize.ONNXSCRIPT,
    dynamic_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIM=NAME", help="A further size that varies, e.g. 1=length, 2=32*height; may be repeated."
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch/--fixed-batch", help="Whether the batch size of the file may vary.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file with the model in onnxruntime.")
    ] = True,
    compact: Annotated[bool, typer.Option("--compact", help="Remove channels that contribute nothing first.")] = False,
    target: Annotated[
        str,
        typer.Option(help="Runtime it is for: onnxruntime, onnxruntime>=1.17, openvino, opencv, tract, portable, ..."),
    ] = "onnxruntime",
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Write a model as ONNX, with masks and normalisation folded, and prove that it computes the same."""
    x = required_input(model, input_shape, batch=2)  # torch.export takes a batch of one for a constant
    samples = None if calibration is None else _read_samples(calibration)
    sparse = transformed(build_model(model, seed=config.seed), config, checkpoint=checkpoint, passes=passes)
    options: dict[str, Any] = {} if quantize is None else {"quantize": quantize.value}
    argument = next(iter(python_inspect.signature(sparse.forward).parameters))
    sizes = dict(map(_named_dimension, dynamic_size or []))
    with showing_stages():
        report = fedmef_fx.export_onnx(
            sparse,
            output,
            example_inputs=(x,),
            weights=weights.value,
            calibration_data=samples,
            calibration_method=calibration_method.value,
            float32_layers=float32_layer or "auto",
            dynamic_batch=dynamic_batch,
            dynamic_sizes={argument: sizes} if sizes else None,
            verify=verify,
            compact=compact,
            target=target,
            optimize=optimize.value,
            **options,
        )
    if verify:
        fedmef_fx.verify_onnx(report.path)  # what is on the disk now
    return Result(report.as_dict(), lambda console: console.print(str(report)))


def _named_dimension(text: str) -> tuple[int, str]:
    dim, _, name = text.partition("=")
    if not dim.isdecimal() or not name:
        raise typer.BadParameter(
            f"got {text!r}; expected a dimension and a name, e.g. 1=length", param_hint="--dynamic-size"
        )
    return int(dim), name


def _read_samples(path: Path) -> list[Tensor]:
    """Batches of the samples in a file of numpy's."""
    where = f"--calibration {path}"
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded[name] for name in loaded.files] if isinstance(loaded, np.lib.npyio.NpzFile) else [loaded]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{where}: cannot be read: {error}; expected an array as numpy.save writes it") from error
    if len(arrays) != 1 or arrays[0].ndim < 2 or not len(arrays[0]):
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise DataError(f"{where}: holds {len(arrays)} arrays ({shapes}); expected one, [samples, ...]")
    (array,) = arrays
    samples = torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
    return list(torch.split(samples, _CALIBRATION_BATCH))
