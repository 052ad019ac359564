"""`fedmef-fx export`: a model as one ONNX file."""

from pathlib import Path
from typing import Annotated

import typer

import fedmef_fx
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.models import Checkpoint, InputShape, ModelName, build_model, required_input, transformed
from fedmef_fx.config import Config

__all__ = ["export"]


@command
@takes_config()
def export(
    *,
    model: ModelName,
    output: Annotated[Path, typer.Argument(metavar="FILE", help="The ONNX file to write.")],
    checkpoint: Checkpoint = None,
    input_shape: InputShape = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch/--fixed-batch", help="Whether the batch size of the file may vary.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file with the model in onnxruntime.")
    ] = True,
    compact: Annotated[bool, typer.Option("--compact", help="Remove channels that contribute nothing first.")] = False,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Write a model as ONNX, with masks and normalisation folded, and prove that it computes the same."""
    x = required_input(model, input_shape, batch=2)  # torch.export takes a batch of one for a constant
    sparse = transformed(build_model(model, seed=config.seed), config, checkpoint=checkpoint)
    report = fedmef_fx.export_onnx(
        sparse, output, example_inputs=(x,), dynamic_batch=dynamic_batch, verify=verify, compact=compact
    )
    return Result(report.as_dict(), lambda console: console.print(str(report)))
