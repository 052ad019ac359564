"""`fedmef-fx doctor`: is everything there, and what would a transformation do to this model?"""

import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console

import fedmef_fx
from fedmef_fx.commands.arguments import build_model
from fedmef_fx.commands.command import AsJson, Result, command
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.reports import coverage_data, passes_data, show_coverage, show_passes
from fedmef_fx.commands.tables import show_table
from fedmef_fx.config import Config
from fedmef_fx.data import DATA_VARIABLE
from fedmef_fx.native import loaded_isa, why_missing
from fedmef_fx.packing import available_backends, backend
from fedmef_fx.records.passes import PassReport
from fedmef_fx.sparse_model.transformation import Coverage

__all__ = ["doctor"]

_REQUIRED: Final = ("torch", "numpy", "networkx", "safetensors", "onnx", "onnxscript", "onnxruntime", "scikit-learn")
_OPTIONAL: Final = {"matplotlib": "pip install 'fedmef-fx[viz]'"}
_IMPORT_NAMES: Final = {"scikit-learn": "sklearn"}


@command
@takes_config()
def doctor(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model to look at, as for the other commands.")
    ] = None,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Check the installation; with a model, tell what a transformation rewrites and refuses.

    The exit code is 1 where something that is needed does not work.
    """
    checks = [
        _python(),
        *map(_required, _REQUIRED),
        *map(_optional, _OPTIONAL),
        _kernels(),
        _backend(),
        _cuda(),
        _data(),
    ]
    data: dict[str, Any] = {"checks": [dict(zip(("what", "state", "found"), check, strict=True)) for check in checks]}
    coverage, passes = None, None
    if model is not None:
        sparse = fedmef_fx.transform(build_model(model, seed=config.seed), config)
        coverage, passes = fedmef_fx.coverage(sparse), fedmef_fx.report(sparse)
        data |= {"model": model, "coverage": coverage_data(coverage), "passes": passes_data(passes)}
    is_well = all(state != "broken" for _, state, _ in checks)
    return Result(data, lambda console: _show(console, checks, coverage, passes), is_success=is_well)


def _python() -> tuple[str, str, str]:
    return ("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _required(package: str) -> tuple[str, str, str]:
    try:
        importlib.import_module(_IMPORT_NAMES.get(package, package))
        return (package, "ok", metadata.version(package))
    except Exception as error:  # an installation can be broken in any way, and this is to tell in which
        return (package, "broken", f"{type(error).__name__}: {error}".splitlines()[0])


def _optional(package: str) -> tuple[str, str, str]:
    try:
        return (package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return (package, "absent", _OPTIONAL[package])


def _kernels() -> tuple[str, str, str]:
    reason = why_missing()
    if reason:
        return ("native kernels", "absent", f"NumPy takes their place, several times as slow: {reason}")
    return ("native kernels", "ok", f"compiled; this processor runs those for {loaded_isa()}")


def _backend() -> tuple[str, str, str]:
    return ("backend", "ok", f"{backend().name} on the CPU; available: {', '.join(available_backends())}")


def _cuda() -> tuple[str, str, str]:
    if not torch.cuda.is_available():
        return ("cuda", "absent", "no device, or a CPU build of torch")
    return ("cuda", "ok", torch.cuda.get_device_name())


def _data() -> tuple[str, str, str]:
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return (DATA_VARIABLE, "absent", "not set; only needed for CIFAR-10")
    files = [path.name for path in Path(value).glob("**/*_batch*.bin")]
    if "test_batch.bin" not in files or "data_batch_1.bin" not in files:
        return (DATA_VARIABLE, "broken", f"{value}: expected data_batch_1.bin, ... and test_batch.bin there")
    return (DATA_VARIABLE, "ok", f"{value}: {len(files)} files")


def _show(
    console: Console, checks: list[tuple[str, str, str]], coverage: Coverage | None, passes: PassReport | None
) -> None:
    show_table(console, ("what", "state", "found"), checks)
    if coverage is not None and passes is not None:
        console.print()
        show_coverage(console, coverage)
        console.print()
        show_passes(console, passes)
