"""`export_onnx`: from a model to one small ONNX file that provably computes the same.

Stages: freeze, trace and translate, strip, check, write to a temporary file, compare in onnxruntime, rename.
Whatever fails, a file that was there before stays as it was. onnx and onnxruntime are imported when they are needed.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from fedmef_fx.atomic import check_target, replacing
from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export._examples import Examples, read_examples, run
from fedmef_fx.export.compact import compact as remove_dead_channels
from fedmef_fx.export.freeze import freeze
from fedmef_fx.export.report import ExportReport, Parity
from fedmef_fx.model import is_transformed

if TYPE_CHECKING:
    import onnx

__all__ = ["export_onnx"]

_WEIGHTS: Final = ("dense",)
_QUANTIZATIONS: Final = (None,)
_LARGEST_FILE_BYTES: Final = 2**31 - 1  # of a protobuf message


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    weights: Literal["dense"] = "dense",
    quantize: None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
    compact: bool = False,
) -> ExportReport:
    """Write a model as ONNX, with masks, NSConv and BatchNorm folded, and prove that the file computes the same.

    Args:
        model: A transformed model, which is frozen, or any other module, which is exported as it is. Exported is what
            eval mode computes, whatever mode the model is in; it does not change.
        path: The file to write, whole or not at all.
        example_inputs: Positional arguments of one call, as a tuple. Tensors whose dimension 0 has the size of the
            first one's share the batch dimension.
        example_kwargs: Keyword arguments of that call. Arguments that are no tensors become constants of the file.
        weights: How weights are stored: "dense".
        quantize: None, as trained.
        dynamic_batch: Let the batch size vary. A model that cannot gets a fixed one, and the report says so.
        verify: Compare the file with the model on several batches and batch sizes before it takes its name.
        compact: Remove channels that contribute nothing first; see `fedmef_fx.compact`.

    Returns:
        Sizes, agreement, and what was done differently from what was asked for.

    Raises:
        ConfigError: An option that is not allowed, or example inputs that do not fit the model.
        ExportError: A path that cannot be written, weights that are not numbers, an operator without ONNX form, or a
            file that computes something else.

    Example:
        >>> import tempfile, fedmef_fx
        >>> sparse = fedmef_fx.transform(torch.nn.Sequential(torch.nn.Linear(8, 4)), fedmef_fx.Config(density=0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(sparse, f"{folder}/model.onnx", example_inputs=(torch.randn(2, 8),))
        >>> report.parity.max_abs < 1e-5
        True
    """
    _check_option("weights", weights, _WEIGHTS)
    _check_option("quantize", quantize, _QUANTIZATIONS)
    target = check_target(path, error=_named_export_error)
    examples = read_examples(model, example_inputs, example_kwargs)
    _check_runs(model, examples)

    clock = _Clock()
    with clock.stage("freeze"):
        plain = freeze(model) if is_transformed(model) else model
        plain = remove_dead_channels(plain, example_inputs, example_kwargs=example_kwargs) if compact else plain
        # A model with a graph per mode takes any arguments; only its graph knows their names and order.
        examples = read_examples(plain, example_inputs, example_kwargs)
        _check_weights(plain)
    with clock.stage("convert"):
        from fedmef_fx.export._convert import convert  # noqa: PLC0415 -- imports onnx

        proto, dynamic, notices = convert(plain, examples, dynamic_batch=dynamic_batch)
    with clock.stage("strip"):
        from fedmef_fx.export._strip import strip  # noqa: PLC0415 -- imports onnx

        strip(proto)
    with clock.stage("check"):
        _check_graph(proto)
    parity, more = _write(proto, target, model if verify else None, examples, dynamic=dynamic, clock=clock)
    return ExportReport(
        path=target,
        bytes=target.stat().st_size,
        dense_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        opset=max(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        nodes=len(proto.graph.node),
        parity=parity,
        seconds=clock.seconds,
        notices=(*notices, *more),
    )


class _Clock:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _named_export_error(message: str) -> ExportError:
    return ExportError(f"export_onnx: {message}")


def _check_option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"export_onnx: got {name}={value!r}; expected {' | '.join(map(repr, allowed))}")


def _check_runs(model: nn.Module, examples: Examples) -> None:
    try:
        run(model, examples.call)
    except Exception as error:
        shapes = ", ".join(f"{t.dtype}{list(t.shape)}" for t in examples.call.tensors())
        raise ConfigError(
            f"export_onnx: {type(model).__name__} itself fails on the example inputs ({shapes}): "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_weights(model: nn.Module) -> None:
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        # Buffers may hold infinities: attention masks do.
        bad = tensor.isnan() if not isinstance(tensor, nn.Parameter) else ~tensor.isfinite()
        if bad.any():
            raise ExportError(
                f"export_onnx: {name} has {int(bad.sum())} of {tensor.numel()} values that are NaN or infinite; the "
                "training diverged: export an earlier checkpoint, or train with a smaller learning rate"
            )
        if tensor.dtype == torch.bfloat16:
            raise ExportError(f"export_onnx: {name} is bfloat16, which onnxruntime cannot run; export model.float()")
    size = sum(tensor.nbytes for _, tensor in named)
    if size > _LARGEST_FILE_BYTES:
        raise ExportError(
            f"export_onnx: the weights take {size:,} bytes; one ONNX file holds at most {_LARGEST_FILE_BYTES:,}. "
            "Export parts of the model, or export model.half()"
        )


def _check_graph(proto: "onnx.ModelProto") -> None:
    import onnx  # noqa: PLC0415 -- only exports need it

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker's and shape inference's errors have no other common base
        raise ExportError(f"export_onnx: onnx refuses the exported graph: {error}") from error


def _write(
    proto: "onnx.ModelProto", target: Path, model: nn.Module | None, examples: Examples, *, dynamic: bool, clock: _Clock
) -> tuple[Parity | None, list[str]]:
    """Write a model; compared with another before it takes its name, unless that is None."""
    parity: Parity | None = None
    notices: list[str] = []
    with replacing(target, error=_named_export_error) as temporary:
        with clock.stage("write"):
            temporary.write_bytes(proto.SerializeToString(deterministic=True))
        if model is not None:
            with clock.stage("verify"):
                from fedmef_fx.export._parity import check_parity  # noqa: PLC0415 -- imports onnxruntime

                parity, notices = check_parity(model, temporary, examples, dynamic=dynamic)
    return parity, notices
