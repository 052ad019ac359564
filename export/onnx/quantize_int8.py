"""Static int8 quantization by onnxruntime.quantization.

Weights become symmetric int8 with a scale per output channel, so that a pruned weight stays exactly 0; activations
become uint8 with the range that the calibration data shows (unsigned is what x86 multiplies fastest). Quantize and
dequantize nodes stand around the float operators; onnxruntime fuses them into integer kernels when it loads the file.
"""

import contextlib
import copy
import dataclasses
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from fedmef_fx.errors import ExportError
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.int8_layers import choose_layers
from fedmef_fx.export.onnx.int8_ranges import activation_ranges
from fedmef_fx.export.onnx.int8_records import LayerPrecision
from fedmef_fx.export.onnx.sessions import array_of
from fedmef_fx.export.onnx.strip import strip

__all__ = ["Quantized", "quantize_int8"]

_PRODUCTS: Final = ("Gemm", "MatMul")


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized graph.

    Attributes:
        proto: The graph.
        layers: How each of its operators computes.
        notices: What was done otherwise than asked for.
    """

    proto: ModelProto
    layers: tuple[LayerPrecision, ...]
    notices: tuple[str, ...]


def quantize_int8(
    proto: ModelProto,
    calibration: Sequence[ExampleCall],
    *,
    method: str = "minmax",
    float32_layers: Sequence[str] | None = None,
) -> Quantized:
    """Quantize a graph.

    Args:
        proto: A float32 graph; it stays as it is.
        calibration: Calls that show the ranges of activations.
        method: How a range is taken: "minmax", all values; "percentile", all but one in ten thousand; "entropy",
            the range that keeps most of what the values tell.
        float32_layers: Names of layers that stay float32; None for those that int8 costs most.

    Raises:
        ExportError: onnxruntime cannot quantize it.
    """
    quantized, notices = _all_layers(proto, calibration, method)
    _leave_results(quantized)
    quantized, layers, more = choose_layers(proto, quantized, calibration, float32_layers)
    return Quantized(quantized, tuple(layers), (*notices, *more))


def _all_layers(proto: ModelProto, calibration: Sequence[ExampleCall], method: str) -> tuple[ModelProto, list[str]]:
    from onnxruntime import quantization as ort  # noqa: PLC0415 -- slow to import

    names = [value.name for value in proto.graph.input]
    # onnxruntime's own histograms for entropy have as many bins as levels, so that they leave out nothing.
    ranges = {} if method == "minmax" else activation_ranges(proto, calibration, method)
    feeds = [dict(zip(names, map(array_of, call.tensors()), strict=True)) for call in calibration]

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self._feeds, None)

    # Its weights have output channels of one group in dimension 1, of which onnxruntime knows nothing.
    grouped = [node for node in proto.graph.node if node.op_type == "ConvTranspose" and _groups(node) > 1]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, result = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        try:
            ort.quantize_static(
                source,
                result,
                Reader(),
                quant_format=ort.QuantFormat.QDQ,
                activation_type=ort.QuantType.QUInt8,
                weight_type=ort.QuantType.QInt8,
                per_channel=True,
                nodes_to_exclude=[node.name for node in grouped],
                extra_options={
                    "WeightSymmetric": True,
                    "ActivationSymmetric": False,
                    "TensorQuantOverrides": {
                        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}]
                        for name, (low, high) in ranges.items()
                    },
                },
            )
        except Exception as error:  # onnxruntime's errors have no other common base
            raise ExportError(
                f"export_onnx: onnxruntime cannot quantize the model: {type(error).__name__}: {error}; export it with "
                "quantize=None"
            ) from error
        quantized = onnx.load(result)
    strip(quantized)
    count = sum(node.op_type == "DequantizeLinear" for node in quantized.graph.node)
    notices = [] if count else ["no operator of the model has an int8 form: nothing was quantized"]
    notices += [f"{node.name} stays float32: a grouped ConvTranspose has no int8 form" for node in grouped]
    return quantized, notices


def _leave_results(quantized: ModelProto) -> None:
    """Let matrix products give the model's outputs in float32: their kernels can, and 8 bits would make ties."""
    graph = quantized.graph
    makers = {node.output[0]: node for node in graph.node}
    reads = Counter(name for node in graph.node for name in node.input)
    for value in graph.output:
        dequantize = makers.get(value.name)
        quantize = makers.get(dequantize.input[0]) if dequantize is not None else None
        product = makers.get(quantize.input[0]) if quantize is not None else None
        if dequantize is None or quantize is None or product is None or product.op_type not in _PRODUCTS:
            continue
        if (dequantize.op_type, quantize.op_type) != ("DequantizeLinear", "QuantizeLinear"):
            continue
        if reads[value.name] or reads[dequantize.input[0]] > 1 or reads[quantize.input[0]] > 1:
            continue
        product.output[0] = value.name
        graph.node.remove(quantize)
        graph.node.remove(dequantize)
    used = {name for node in graph.node for name in node.input}
    kept = [copy.deepcopy(tensor) for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _groups(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out onnxruntime's advice to optimize the graph first, which the exporter has done; errors still show."""
    root, handler = logging.getLogger(), logging.NullHandler()

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root.addHandler(handler)  # without any, the first message would configure the application's logging
    root.addFilter(is_no_advice)
    try:
        yield
    finally:
        root.removeFilter(is_no_advice)
        root.removeHandler(handler)
