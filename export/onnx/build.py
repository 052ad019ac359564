"""Build: from a converted model to the graph that is written: simplified, stripped, checked, quantized, encoded."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

from onnx import ModelProto

from fedmef_fx.errors import ConfigError
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.onnx.checks import check_folded, check_graph, serialized_in_memory
from fedmef_fx.export.onnx.clock import Clock
from fedmef_fx.export.onnx.codecs.tensor import EncodedTensor
from fedmef_fx.export.onnx.convert import Converted
from fedmef_fx.export.onnx.encode import StoredWeights, apply_encoding, encode, round_weights, zero_is_positive
from fedmef_fx.export.onnx.entropy import EntropyBounds, entropy_bounds
from fedmef_fx.export.onnx.int8_records import LayerPrecision
from fedmef_fx.export.onnx.manifest import Manifest, ManifestTensor
from fedmef_fx.export.onnx.names import drop_defaults, shorten_names
from fedmef_fx.export.onnx.origins import readers_of
from fedmef_fx.export.onnx.parity import FLOAT32_TOLERANCE
from fedmef_fx.export.onnx.shrink import share_equal, shrink_quantizers
from fedmef_fx.export.onnx.strip import strip
from fedmef_fx.export.onnx.write import LARGEST_FILE_BYTES, stored_bytes
from fedmef_fx.export.sizes import Sizes

__all__ = ["BuildPlan", "Built", "build"]

# Rounding to 16 bits changes outputs by less than this; None: int8 changes them by what the calibration gives.
_TOLERANCES: Final[dict[StoredWeights, float]] = {
    "dense": FLOAT32_TOLERANCE,
    "packed": FLOAT32_TOLERANCE,
    "packed-int16": 1e-3,
    "packed-fp16": 1e-2,
}


@dataclasses.dataclass(frozen=True, slots=True)
class BuildPlan:
    """What to build.

    Attributes:
        weights: As for `export_onnx`.
        quantize: Likewise.
        uses_slim: Whether onnxslim simplifies the graph.
        is_frozen: Whether the model is a frozen graph, in which no BatchNorm may be left that could be folded.
        sizes: Sizes that vary besides the batch, by input and dimension.
        calibration_method: As for `export_onnx`.
        float32_layers: Likewise; None for those that int8 costs most.
    """

    weights: StoredWeights
    quantize: str | None
    uses_slim: bool
    is_frozen: bool
    sizes: Sizes
    calibration_method: str = "minmax"
    float32_layers: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """A graph to write.

    Attributes:
        proto: The graph.
        manifest: What it says about itself.
        plain: The graph as it was traced, stripped: names of its values are those of the traced program.
        reference: The same graph with the same weights stored plainly, serialized: the file has to give the same bits.
            None where nothing is encoded, or it is too large for one file.
        plain_bytes: Size of the graph with dense float32 weights.
        plain_nodes: Its nodes.
        bounds: The least that the weights can take.
        tolerance: Largest difference from the model that is allowed, relative to an output; None for any.
        notices: What was done otherwise than asked for.
        layers: How each operator of a quantized graph computes.
    """

    proto: ModelProto
    manifest: Manifest
    plain: ModelProto
    reference: bytes | None
    plain_bytes: int
    plain_nodes: int
    bounds: EntropyBounds
    tolerance: float | None
    notices: tuple[str, ...]
    layers: tuple[LayerPrecision, ...] = ()

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return max(int(entry.version) for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx"))


def build(converted: Converted, plan: BuildPlan, calibration: Sequence[ExampleCall] | None, clock: Clock) -> Built:
    """Build the graph of a file.

    Raises:
        ExportError: A graph that onnx refuses, or that is not folded as it should be.
    """
    with clock.stage("strip"):
        nodes = readers_of(converted.proto)
        plain = _slimmed(converted.proto) if plan.uses_slim else converted.proto
        strip(plain, plan.sizes)
        zero_is_positive(plain)
    with clock.stage("check"):
        serialized = serialized_in_memory(plain)
        check_graph(plain, serialized)
        check_folded(plain, is_frozen=plan.is_frozen)
    built = Built(
        proto=plain,
        manifest=Manifest(plan.weights, plan.quantize, ()),
        plain=plain,
        reference=None,
        plain_bytes=stored_bytes(plain) if serialized is None else len(serialized),
        plain_nodes=len(plain.graph.node),
        bounds=EntropyBounds(0.0, 0.0),
        tolerance=None if plan.quantize else _TOLERANCES[plan.weights],
        notices=(),
    )
    if calibration is not None:
        from fedmef_fx.export.onnx.quantize_int8 import quantize_int8  # noqa: PLC0415 -- slow to import

        with clock.stage("quantize"):
            result = quantize_int8(
                plain, calibration, method=plan.calibration_method, float32_layers=plan.float32_layers
            )
            built = dataclasses.replace(built, proto=result.proto, notices=result.notices, layers=result.layers)
            serialized = None  # of another graph
    if plan.weights == "dense":
        return dataclasses.replace(built, bounds=entropy_bounds(built.proto, {}))
    with clock.stage("encode"):
        built = _encoded(built, plan, nodes, serialized)
    with clock.stage("check encoded"):
        check_graph(built.proto, serialized_in_memory(built.proto), what="encoded")
    return built


def _encoded(built: Built, plan: BuildPlan, nodes: Mapping[str, str], serialized: bytes | None) -> Built:
    """Encode the weights of a graph; the given one stays as it is, and `serialized` is that or None."""
    proto = copy.deepcopy(built.proto)
    encoding = encode(proto, plan.weights)
    tensors = encoding.tensors
    notices = [*built.notices, *encoding.notices]
    if not tensors:
        notices.append("no weight takes fewer bytes encoded: all are stored plainly")
    bounds, reference = entropy_bounds(proto, tensors), _reference(proto, plan, tensors, serialized)
    shrink_quantizers(proto)
    apply_encoding(proto, tensors)
    share_equal(proto)
    drop_defaults(proto)
    renamed = shorten_names(proto)
    return dataclasses.replace(
        built,
        proto=proto,
        manifest=_manifest(plan, tensors, renamed, nodes),
        reference=reference,
        bounds=bounds,
        notices=tuple(notices),
    )


def _slimmed(proto: ModelProto) -> ModelProto:
    try:
        import onnxslim  # noqa: PLC0415 -- optional
    except ImportError as error:
        raise ConfigError(
            "export_onnx: optimize='onnxslim' needs the package onnxslim; install it: pip install onnxslim"
        ) from error
    slimmed: ModelProto = onnxslim.slim(proto)
    return slimmed


def _reference(
    proto: ModelProto, plan: BuildPlan, encoded: Mapping[str, EncodedTensor], serialized: bytes | None
) -> bytes | None:
    """The graph with decoded weights in place of encoded ones, serialized."""
    decoded_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in encoded.values())
    if not encoded or stored_bytes(proto) + decoded_bytes > LARGEST_FILE_BYTES:
        return None
    if plan.weights == "packed" and serialized is not None:  # which keeps every bit
        return serialized
    if plan.weights != "packed":
        proto = copy.deepcopy(proto)
        round_weights(proto, encoded)
    result: bytes = proto.SerializeToString()
    return result


def _manifest(
    plan: BuildPlan, encoded: Mapping[str, EncodedTensor], renamed: Mapping[str, str], nodes: Mapping[str, str]
) -> Manifest:
    tensors = []
    for name, tensor in encoded.items():
        origin = name.removesuffix("_quantized")
        tensors.append(
            ManifestTensor(
                name=origin,
                value=renamed.get(name, name),
                shape=tensor.shape,
                codec=tensor.codec,
                active=tensor.active,
                bytes=tensor.nbytes,
                node=nodes.get(origin, ""),
            )
        )
    return Manifest(plan.weights, plan.quantize, tuple(tensors))
