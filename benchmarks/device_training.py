"""Sparse models that train in ExecuTorch's runtime: file, planned memory, and agreement with torch.

    python benchmarks/device_training.py [--models digits_cnn mobilenet_v2 resnet18] [--batch 8] [--steps 20]

Needs the extra `executorch`. Each model is transformed at the configuration's defaults and written with dense and with
packed weights. At each step of gradient descent in the runtime, torch computes loss and gradients at the same weights.
The runtime's portable kernels are plain loops: a step of ResNet18 takes seconds per image.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table

import fedmef_fx
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.models import REFERENCE_MODELS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits_cnn", "mobilenet_v2", "resnet18"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the packages that ExecuTorch imports
    table = Table(title=f"Training steps in ExecuTorch, batch {options.batch}; {machine()}")
    for column in ("model", "weights", "file", "planned", "steps", "loss", "gradients", "worst", "masked", "seconds"):
        table.add_column(column, justify="right")
    for name in options.models:
        for storage in ("dense", "packed"):
            torch.manual_seed(0)
            shape = (1, 8, 8) if name == "digits_cnn" else (3, 32, 32)
            model = fedmef_fx.transform(REFERENCE_MODELS[name](), fedmef_fx.Config(weight_storage=storage))
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                report = fedmef_fx.export_executorch(
                    model,
                    Path(folder, "model.pte"),
                    example_inputs=(torch.randn(options.batch, *shape),),
                    example_target=torch.randint(0, 10, (options.batch,)),
                    check_steps=options.steps,
                )
            check = report.check
            figures = ("-",) * 4
            if check is not None:
                differences = (check.loss, check.gradients, check.worst_gradients)
                figures = (*(f"{value:.1e}" for value in differences), f"{check.masked:g}")
            sizes = shown_bytes(report.bytes), shown_bytes(report.planned_bytes)
            seconds = f"{time.perf_counter() - start:.0f}"
            table.add_row(name, storage, *sizes, str(options.steps), *figures, seconds)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
