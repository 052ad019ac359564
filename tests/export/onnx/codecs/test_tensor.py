"""Encoded tensors: numpy's decoder, and the ONNX subgraph, give back every bit that was kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from fedmef_fx.export.onnx import decode_graph as _decode_graph
from fedmef_fx.export.onnx.codecs import exponents
from fedmef_fx.export.onnx.codecs import tensor as tensors
from fedmef_fx.export.onnx.codecs.tensor import EncodedTensor, decode_tensor, encode_tensor
from fedmef_fx.export.onnx.codecs.values import ValueCode

DTYPES: dict[ValueCode, type] = {
    "float32": np.float32,
    "float16": np.float32,
    "int16": np.float32,
    "int8": np.int8,
}


@pytest.fixture(autouse=True)
def _small_tensors_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_NODE_BYTES", 0)
    monkeypatch.setattr(exponents, "_SPLIT_BYTES", 0)
    monkeypatch.setattr(exponents, "_LEVEL_BYTES", 0)


def _weights(shape: tuple[int, ...], density: float, dtype: type, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(shape) * 40).astype(dtype)
    values[rng.random(shape) >= density] = 0
    return values


def _decoded_by_onnx(encoded: EncodedTensor) -> NDArray[Any]:
    decoder = _decode_graph.DecodeGraph({"out"})
    decoder.add(encoded, "out")
    kind = helper.np_dtype_to_tensor_dtype(encoded.dtype)
    output = helper.make_tensor_value_info("out", kind, encoded.shape)
    graph = helper.make_graph(decoder.nodes, "g", [], [output], decoder.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    decoded: NDArray[Any] = session.run(None, {})[0]
    return decoded


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.floats(0.0, 1.0),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.sampled_from([7, 64, 1 << 20]),
    st.booleans(),
    st.integers(0, 99),
)
def test_numpy_and_onnx_decode_the_same(
    values: ValueCode, density: float, shape: tuple[int, ...], chunk: int, splits: bool, seed: int
) -> None:
    weights = _weights(shape, density, DTYPES[values], seed)
    encoded = encode_tensor(weights, values, splits=splits, chunk_elements=chunk)
    if encoded is None:
        return

    decoded = decode_tensor(encoded)

    if values in ("float32", "int8"):
        assert decoded.tobytes() == weights.tobytes()
    assert decoded.dtype == weights.dtype
    assert np.array_equal(decoded == 0, weights == 0) or values == "int16"
    by_onnx = _decoded_by_onnx(encoded)
    assert by_onnx.dtype == decoded.dtype
    assert by_onnx.tobytes() == decoded.tobytes()


@pytest.mark.parametrize("values", sorted(DTYPES))
@pytest.mark.parametrize("density", [0.0, 0.004, 0.03, 0.1, 0.3, 0.6, 1.0])
def test_every_code_in_chunks(values: ValueCode, density: float) -> None:
    weights = _weights((24, 16, 3, 3), density, DTYPES[values])
    encoded = encode_tensor(weights, values, chunk_elements=1000)
    if encoded is None:
        assert (density, values) == (1.0, "int8")
        return
    assert len(encoded.chunks) == (1 if encoded.codec.startswith("dense") else 4)
    assert _decoded_by_onnx(encoded).tobytes() == decode_tensor(encoded).tobytes()


@pytest.mark.parametrize("positions", [[0], [-1], [0, -1], list(range(500, 600)), list(range(0, 3000, 300))], ids=str)
def test_adversarial_positions(positions: list[int]) -> None:
    weights = np.zeros(3000, np.float32)
    weights[positions] = [1e-45, 3.4e38, -1.0][: len(positions)] * 1 if len(positions) < 3 else -2.5
    encoded = encode_tensor(weights.reshape(30, 100), "float32", chunk_elements=1024)

    assert encoded is not None
    assert decode_tensor(encoded).tobytes() == weights.tobytes()
    assert _decoded_by_onnx(encoded).tobytes() == weights.tobytes()


def test_codecs_by_density() -> None:
    found = {}
    for density in (0.02, 0.1, 0.6, 1.0):
        for values in ("float32", "int8"):
            weights = _weights((256, 256), density, DTYPES[values])  # type: ignore[index]
            encoded = encode_tensor(weights, values, splits=False)  # type: ignore[arg-type]
            found[density, values] = None if encoded is None else encoded.codec
        split = encode_tensor(_weights((256, 256), density, np.float32), "float32")
        assert split is not None
        found[density, "split"] = split.codec

    assert found == {
        (0.02, "float32"): "rice5/float32",
        (0.02, "int8"): "rice5/int8",
        (0.02, "split"): "gap7/float32-e224",  # beside split values Rice has to save more
        (0.1, "float32"): "gap4/float32",  # Rice saves too little beside values of 32 bits
        (0.1, "int8"): "rice3/int8",
        (0.1, "split"): "gap4/float32-e224",
        (0.6, "float32"): "bitmap/float32",
        (0.6, "int8"): "bitmap/int8",
        (0.6, "split"): "bitmap/float32-e224",
        (1.0, "float32"): None,
        (1.0, "int8"): None,
        (1.0, "split"): "bitmap/float32-e224",
    }


# float32 of all kinds, in a tensor of 3000 elements of which it is one in four.
ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60)
@given(st.lists(ANY_FLOAT, min_size=1, max_size=60), st.sampled_from([50, 97, 1 << 20]))
@example([1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, -1.5], 50)
@example([1.0] * 50, 1 << 20)
@example([-0.1], 1 << 20)
def test_split_values_of_all_kinds_are_decoded_bit_by_bit(chosen: list[float], chunk: int) -> None:
    weights = np.zeros((len(chosen), 4), np.float32)
    weights[:, 1] = chosen
    weights += 0.0  # -0 is no active value
    encoded = encode_tensor(weights, "float32", chunk_elements=chunk)
    if encoded is None:
        return

    assert decode_tensor(encoded).tobytes() == weights.tobytes()
    assert _decoded_by_onnx(encoded).tobytes() == weights.tobytes()


@pytest.mark.parametrize("density", [0.01, 0.1, 1.0])
def test_onnxruntime_decodes_split_values_when_it_loads_them(density: float, tmp_path: Path) -> None:
    weights = _weights((200, 300), density, np.float32)
    weights[0, :3] = 1e-40, 3e38, -1e-10  # outliers
    encoded = encode_tensor(weights, "float32")
    assert encoded is not None
    assert encoded.exponents is not None
    decoder = _decode_graph.DecodeGraph({"x", "w", "y"})
    decoder.add(encoded, "w")
    nodes = [*decoder.nodes, helper.make_node("Add", ["x", "w"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (200, 300)) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], decoder.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")

    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["Add"]
    result = session.run(None, {"x": np.zeros((200, 300), np.float32)})[0]
    assert result[1:].tobytes() == weights[1:].tobytes()


def test_splitting_takes_an_eighth_less_and_needs_enough_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for shape, is_split in (((300, 300), True), (((20, 20)), False)):
        weights = _weights(shape, 0.1, np.float32)
        plain, split = (encode_tensor(weights, "float32", splits=splits) for splits in (False, True))
        assert plain is not None
        assert split is not None
        assert (split.exponents is not None) == is_split
        assert split.nbytes < 0.875 * plain.nbytes if is_split else split.nbytes == plain.nbytes


def test_int16_has_a_scale_per_channel_and_a_smaller_error_than_float16() -> None:
    weights = _weights((8, 200), 0.2, np.float32) * np.logspace(-4, 0, 8, dtype=np.float32)[:, None]

    errors = {}
    for values in ("int16", "float16"):
        encoded = encode_tensor(weights, values)
        assert encoded is not None
        errors[values] = np.abs(decode_tensor(encoded) - weights).max(axis=1)

    # Rounding to the nearest of 2 * 32767 steps, and one rounding of the product.
    assert (errors["int16"] <= np.abs(weights).max(axis=1) / 32767 * 0.5001).all()
    assert errors["int16"].sum() * 4 < errors["float16"].sum()


def test_float16_does_not_hold_large_values() -> None:
    weights = _weights((10, 100), 0.1, np.float32)
    weights[0, 0] = 70_000

    assert encode_tensor(weights, "float16") is None


def test_a_decoder_has_to_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights((20, 10), 0.5, np.float32)
    assert encode_tensor(weights, "float32") is not None

    monkeypatch.setattr(tensors, "_NODE_BYTES", 500)
    assert encode_tensor(weights, "float32") is None


def test_constants_are_shared_between_tensors() -> None:
    encoded = encode_tensor(_weights((64, 64), 0.1, np.int8), "int8")
    assert encoded is not None
    assert encoded.codec == "rice3/int8"
    decoder = _decode_graph.DecodeGraph({"a", "one", "two"})
    decoder.add(encoded, "one")
    alone = len(decoder.initializers), len(decoder.nodes)

    decoder.add(encoded, "two")

    # Values, remainders and stream are its own; tables and the zeros that positions are written to are shared.
    own = len(decoder.initializers) - alone[0]
    assert own == 4  # remainders of 3 bits are two planes
    shared = 1 + len({1, 2})  # and a table for each width of planes
    assert len(decoder.nodes) == 2 * alone[1] - shared
    assert "a" not in {output for node in decoder.nodes for output in node.output}
