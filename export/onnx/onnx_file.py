"""`export_onnx`: from a model to one small ONNX file that provably computes the same.

Stages: freeze, trace and translate, strip, check, quantize, encode, write to a temporary file, compare in onnxruntime,
rename. Whatever fails, a file that was there before stays as it was. onnx and onnxruntime are imported when needed.
"""

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, get_args

from torch import fx, nn

from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.compact.compact import compact as remove_dead_channels
from fedmef_fx.export.examples import ExampleCall, read_examples
from fedmef_fx.export.freeze.freeze import frozen_graph
from fedmef_fx.export.onnx.calibration import calibration_calls, check_batch_sizes
from fedmef_fx.export.onnx.checks import check_finite, check_masked, check_runs
from fedmef_fx.export.onnx.clock import Clock
from fedmef_fx.export.onnx.precision import in_float32, other_precision, widened
from fedmef_fx.export.onnx.report import ExportReport
from fedmef_fx.export.results import Wanted
from fedmef_fx.files.atomic import check_target
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["export_onnx"]

Weights = Literal["dense", "packed", "packed-int16", "packed-fp16"]
Quantize = Literal["int8"] | None
CalibrationMethod = Literal["minmax", "percentile", "entropy"]
Optimize = Literal["none", "onnxscript", "onnxslim"]
_LOGGER: Final = logging.getLogger(__name__)
_QUANTIZATIONS: Final = (None, "int8")


def export_onnx(  # noqa: PLR0913 -- one call with options that name themselves
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    weights: Weights = "dense",
    quantize: Quantize = None,
    calibration_data: Iterable[Any] | None = None,
    calibration_method: CalibrationMethod = "minmax",
    float32_layers: Sequence[str] | Literal["auto"] = "auto",
    dynamic_batch: bool = True,
    dynamic_sizes: Mapping[str, Mapping[int, str]] | None = None,
    outputs: Sequence[str] | None = None,
    verify: bool = True,
    optimize: Optimize = "onnxscript",
    compact: bool = False,
    target: str = "onnxruntime",
) -> ExportReport:
    """Write a model as ONNX, with masks, NSConv and BatchNorm folded, and prove that the file computes the same.

    Args:
        model: A transformed model, which is frozen, or any other module, which is exported as it is. Exported is what
            eval mode computes, whatever mode the model is in; it does not change.
        path: The file to write, whole or not at all.
        example_inputs: Positional arguments of one call, as a tuple. Tensors whose dimension 0 has the size of the
            first one's share the batch dimension.
        example_kwargs: Keyword arguments of that call. Arguments that are no tensors become constants of the file.
        weights: How weights are stored: "dense"; "packed", active values and their positions, lossless; "packed-int16"
            and "packed-fp16", likewise with values of 16 bits. A packed file decodes itself: onnxruntime does it once,
            when it loads the file, and then runs as fast as with the dense one.
        quantize: None, as trained; "int8", static quantization of weights and activations.
        calibration_data: For "int8": inputs like those the model will see, from which the ranges of its activations
            are taken. Each is a tensor, or a tuple of the arguments of a call; or a `DataLoader`, whose labels are
            left out.
        calibration_method: How a range is taken from them: "minmax", all values; "percentile", all but one in ten
            thousand; "entropy", the range that keeps most of what the values tell. Try another where outliers stretch
            the ranges.
        float32_layers: Layers that "int8" leaves in float32: names, as the report's `layers` has them; "auto", the
            costliest ones if int8 changes outputs on calibration data by more than 5 % of their spread; () for none.
        dynamic_batch: Let the batch size vary. A model that cannot gets a fixed one, and the report says so.
        dynamic_sizes: Further sizes that vary, by argument and dimension: `{"tokens": {1: "length"}}`. Sizes of one
            name are equal. `{"x": {2: "32*height", 3: "32*width"}}` are multiples of 32; where a model takes only such
            sizes and they are not named, they are found out, and the report says so.
        outputs: Which of the model's results the file has, by key, field or position ("output_0"); None for all but
            caches of keys and values, which are written when they are named: `outputs=["logits", "past_key_values"]`.
        verify: Compare the file with the model on several batches and batch sizes before it takes its name.
        optimize: What simplifies the graph before weights are encoded: "onnxscript", "onnxslim" in addition (which has
            to be installed), "none".
        compact: Remove channels that contribute nothing first; see `fedmef_fx.compact`.
        target: The runtime that the file is for: "onnxruntime" or "onnxruntime>=1.17"; "openvino", "opencv", "tract",
            "portable", which run the file where they are installed and have to agree; "mnn", "ncnn", whose converters
            take dense files alone.

    Returns:
        Sizes, agreement, and what was done differently from what was asked for.

    Raises:
        ConfigError: An option that is not allowed, or example inputs or calibration data that do not fit the model.
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
    _check_option("weights", weights, get_args(Weights))
    _check_option("quantize", quantize, _QUANTIZATIONS)
    _check_option("calibration_method", calibration_method, get_args(CalibrationMethod))
    if isinstance(float32_layers, str) and float32_layers != "auto":
        raise ConfigError(
            f"export_onnx: got float32_layers={float32_layers!r}; expected 'auto' or names, e.g. [{float32_layers!r}]"
        )
    _check_option("optimize", optimize, get_args(Optimize))
    from fedmef_fx.export.onnx.targets import check_format, read_target  # noqa: PLC0415 -- imports onnx

    runtime_target = read_target(target, weights=weights)
    destination = check_target(path, error=_named_export_error)
    model = uncompiled_model(model)
    wanted = Wanted(None if outputs is None else tuple(outputs))
    examples = read_examples(model, example_inputs, example_kwargs, dynamic_sizes, wanted=wanted)
    left_out = check_runs(model, examples)
    calls = calibration_calls(model, quantize, calibration_data, examples)

    clock = Clock()
    with clock.stage("freeze"):
        # Before freezing, so that what it folds is not rounded to 16 bits.
        reference, arguments, notices = _in_float32(model, example_inputs, example_kwargs)
        plain = frozen_graph(reference) if is_transformed(reference) else reference
        check_finite(plain)
        check_masked(reference, plain)
        if compact:
            plain = remove_dead_channels(plain, arguments[0], example_kwargs=arguments[1])
        # A model with a graph per mode takes any arguments; only its graph knows their names and order.
        examples = read_examples(plain, *arguments, dynamic_sizes, wanted=wanted)
        calibration = None if calls is None else [ExampleCall(*widened(call.args, call.kwargs)) for call in calls]
    with clock.stage("convert"):
        from fedmef_fx.export.onnx.convert import convert  # noqa: PLC0415 -- imports onnx

        converted = convert(plain, examples, dynamic_batch=dynamic_batch, optimize=optimize != "none")
        if calibration is not None:
            check_batch_sizes(calibration, converted.examples, is_dynamic=converted.is_dynamic)

    from fedmef_fx.export.onnx.build import BuildPlan, build  # noqa: PLC0415 -- imports onnx and onnxruntime
    from fedmef_fx.export.onnx.write import total_bytes, written  # noqa: PLC0415

    plan = BuildPlan(
        weights,
        quantize,
        uses_slim=optimize == "onnxslim",
        is_frozen=isinstance(plain, fx.GraphModule),
        sizes=converted.examples.sizes,
        calibration_method=calibration_method,
        float32_layers=None if float32_layers == "auto" else tuple(float32_layers),
    )
    built = build(converted, plan, calibration, clock)
    check_format(built.proto, runtime_target)
    nodes = len(built.proto.graph.node)
    parity, runtime = None, None
    with contextlib.ExitStack() as stack:
        with clock.stage("write"):
            temporary = stack.enter_context(written(built.proto, built.manifest, destination))
        if verify:
            from fedmef_fx.export.onnx.verify_file import verify_file  # noqa: PLC0415 -- imports onnxruntime

            with clock.stage("verify"):
                parity, runtime, more = verify_file(
                    temporary, reference, converted, built, calibration or (), target=runtime_target
                )
            notices += more
        elif runtime_target.module:
            notices.append(f"not tried in {target}, as verify=False: only the format was checked")
    size = total_bytes(destination)
    _LOGGER.info("export: %s: %d bytes, %d nodes", destination, size, nodes)
    return ExportReport(
        path=destination,
        bytes=size,
        dense_bytes=_dense_bytes(model),
        opset=built.opset,
        nodes=nodes,
        parity=parity,
        seconds=clock.seconds,
        notices=(*left_out, *converted.notices, *built.notices, *notices),
        weights=weights,
        quantize=quantize,
        plain_bytes=built.plain_bytes,
        entropy_bytes=built.bounds.whole,
        exponent_entropy_bytes=built.bounds.exponents,
        plain_nodes=built.plain_nodes,
        tensors=built.manifest.tensors,
        runtime=runtime,
        layers=built.layers,
    )


def _named_export_error(message: str) -> ExportError:
    return ExportError(f"export_onnx: {message}")


def _check_option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"export_onnx: got {name}={value!r}; expected {' | '.join(map(repr, allowed))}")


def _in_float32(
    model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> tuple[nn.Module, tuple[Sequence[Any], Mapping[str, Any] | None], list[str]]:
    """The model to export, example arguments for it, and notices.

    A model of other floats becomes one of float32: onnxruntime's CPU kernels know few operators for other types.
    """
    types = other_precision(model)
    if not types:
        return model, (inputs, kwargs), []
    notice = f"converted from {types} to float32: inputs and outputs of the file are float32"
    return in_float32(model), widened(inputs, kwargs), [notice]


def _dense_bytes(model: nn.Module) -> int:
    """Bytes of the parameters in their dense form, however they are stored."""
    stored = sum(parameter.nbytes for parameter in model.parameters())
    packed = (
        [masked for masked in masked_parameters(model).values() if masked.is_packed] if is_transformed(model) else []
    )
    missing = sum((masked.numel - masked.parameter.numel()) * masked.parameter.element_size() for masked in packed)
    return stored + missing
