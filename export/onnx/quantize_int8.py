"""Static int8 quantization by onnxruntime.quantization.

Weights become symmetric int8 with a scale per output channel, so that a pruned weight stays exactly 0; activations
become uint8 with the range that the calibration data shows (unsigned is what x86 multiplies fastest). Quantize and
dequantize nodes stand around the float operators; onnxruntime fuses them into integer kernels when it loads the file.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from fedmef_fx.errors import ExportError
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.sessions import array_of
from fedmef_fx.export.onnx.strip import strip

__all__ = ["quantize_int8"]


def quantize_int8(proto: ModelProto, calibration: Sequence[ExampleCall]) -> tuple[ModelProto, list[str]]:
    """Quantize a graph.

    Args:
        proto: A float32 graph; it stays as it is.
        calibration: Calls that show the ranges of activations.

    Returns:
        The quantized graph, and notices.

    Raises:
        ExportError: onnxruntime cannot quantize it.
    """
    from onnxruntime import quantization as ort  # noqa: PLC0415 -- slow to import

    names = [value.name for value in proto.graph.input]
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
                extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
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
