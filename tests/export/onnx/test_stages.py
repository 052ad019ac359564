"""The stages of an export, each on a small graph made by hand."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from fedmef_fx import Config, freeze, transform
from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx import write as _write
from fedmef_fx.export.onnx.checks import check_folded, check_graph, check_masked
from fedmef_fx.export.onnx.decode_graph import short_names
from fedmef_fx.export.onnx.encode import apply_encoding, encode, round_weights, zero_is_positive
from fedmef_fx.export.onnx.entropy import entropy_bounds
from fedmef_fx.export.onnx.names import drop_defaults, names_of, shorten_names
from fedmef_fx.export.onnx.shrink import share_equal, shrink_quantizers

FLOAT = TensorProto.FLOAT


def _model(nodes: list[Any], arrays: dict[str, NDArray[Any]], shape: tuple[int, ...] = (2, 64)) -> ModelProto:
    x = helper.make_tensor_value_info("x", FLOAT, shape)
    y = helper.make_tensor_value_info("y", FLOAT, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "graph", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _run(proto: ModelProto, shape: tuple[int, ...] = (2, 64)) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    found: NDArray[Any] = session.run(["y"], {"x": x})[0]
    return found


def _sparse(shape: tuple[int, ...], density: float = 0.1, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    weight: NDArray[np.float32] = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) >= density] = 0
    return weight


def _twice(weight: NDArray[Any]) -> ModelProto:
    """A weight that two nodes read."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="one"), helper.make_node("MatMul", ["h", "w"], ["y"])]
    return _model(nodes, {"w": weight})


def test_a_negative_zero_is_not_stored() -> None:
    weight = _sparse((64, 64))
    proto = _twice(np.where(weight == 0, np.float32(-0.0), weight))

    zero_is_positive(proto)

    encoded = encode(proto, "packed").tensors["w"]
    assert encoded.active == np.count_nonzero(weight)
    assert numpy_helper.to_array(proto.graph.initializer[0]).tobytes() == weight.tobytes()


@pytest.mark.parametrize("weights", ["packed", "packed-int16", "packed-fp16"])
def test_an_encoded_graph_computes_what_its_rounded_weights_do(weights: Any) -> None:
    proto, reference = _twice(_sparse((64, 64))), _twice(_sparse((64, 64)))
    encoded = encode(proto, weights).tensors

    round_weights(reference, encoded)
    apply_encoding(proto, encoded)

    assert _run(proto).tobytes() == _run(reference).tobytes()
    assert sum(node.op_type == "ScatterElements" for node in proto.graph.node) == 1  # though it is read twice


def test_what_is_left_plain() -> None:
    arrays = {
        "dense": _sparse((64, 64), 1.0),
        "small": _sparse((8, 8)),
        "whole": np.zeros((64, 64), np.int64),
        "bias": _sparse((300,), 0.9),
        "sparse": _sparse((64, 64)),
    }
    proto = _model([helper.make_node("Identity", ["x"], ["y"])], arrays)

    assert list(encode(proto, "packed").tensors) == ["sparse"]
    assert list(encode(proto, "packed-int16").tensors) == ["dense", "sparse"]
    assert encode(proto, "dense").tensors == {}


def test_small_weights_of_large_models_stay_exact() -> None:
    small, large = _sparse((40, 40)), _sparse((1000, 1000))
    alone = _model([helper.make_node("Identity", ["x"], ["y"])], {"small": small})
    beside = _model([helper.make_node("Identity", ["x"], ["y"])], {"small": small, "large": large})

    assert encode(alone, "packed-int16").tensors["small"].values == "int16"
    assert {name: t.values for name, t in encode(beside, "packed-int16").tensors.items()} == {
        "small": "float32",
        "large": "int16",
    }


def test_values_beyond_float16_stay_float32_with_a_notice() -> None:
    weight = _sparse((64, 64))
    weight[0, 0] = 1e5

    encoding = encode(_twice(weight), "packed-fp16")

    assert encoding.tensors["w"].values == "float32"
    assert encoding.notices == ("w stays float32: it reaches 1e+05, more than float16 holds",)


def test_a_weight_that_is_an_output_keeps_its_name() -> None:
    proto = _model([helper.make_node("Relu", ["x"], ["y"])], {"w": _sparse((64, 64))})
    proto.graph.output.append(helper.make_tensor_value_info("w", FLOAT, (64, 64)))

    apply_encoding(proto, encode(proto, "packed").tensors)
    shorten_names(proto)

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(["w"], {"x": np.zeros((2, 64), np.float32)})[0], _sparse((64, 64)))


def test_short_names_are_different_and_free() -> None:
    names = short_names({"a", "c", "a0"})
    found = [next(names) for _ in range(5000)]

    assert len(set(found)) == 5000
    assert found[:3] == ["b", "d", "e"]
    assert not {"a", "c", "a0"} & set(found)
    assert max(map(len, found)) <= 3


def test_names_are_shortened_in_inner_graphs_too() -> None:
    def branch(kind: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"inner_{kind}", FLOAT, None)
        return helper.make_graph([helper.make_node(kind, ["hidden"], [f"inner_{kind}"])], f"branch_{kind}", [], [out])

    nodes = [
        helper.make_node("Relu", ["x"], ["hidden"], name="node_relu"),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch("Neg"), else_branch=branch("Abs")),
    ]
    proto = _model(nodes, {"condition": np.array(True)})
    expected = _run(proto)

    renamed = shorten_names(proto)

    assert np.array_equal(_run(proto), expected)
    assert set(renamed) == {"hidden", "condition", "inner_Neg", "inner_Abs"}
    assert names_of(proto) == {"x", "y", *renamed.values()}
    assert not any(node.name for node in proto.graph.node)


def test_only_defaults_are_dropped() -> None:
    attributes = {"strides": [1, 1], "dilations": [2, 2], "pads": [0, 0, 0, 0], "group": 1, "auto_pad": "NOTSET"}
    conv = helper.make_node("Conv", ["x", "w"], ["h"], **attributes)
    gemm = helper.make_node("Gemm", ["f", "v"], ["y"], alpha=1.0, beta=0.5, transA=0, transB=1)
    nodes = [conv, helper.make_node("Flatten", ["h"], ["f"], axis=1), gemm]
    proto = _model(nodes, {"w": _sparse((4, 3, 3, 3), 1.0), "v": _sparse((5, 16), 1.0)}, (2, 3, 6, 6))
    expected = _run(proto, (2, 3, 6, 6))

    drop_defaults(proto)

    assert [[a.name for a in node.attribute] for node in proto.graph.node] == [["dilations"], [], ["beta", "transB"]]
    assert np.array_equal(_run(proto, (2, 3, 6, 6)), expected)


def test_equal_initializers_are_stored_once() -> None:
    one = np.ones(3, np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("Sub", ["q", "c"], ["y"]),
    ]
    proto = _model(nodes, {"a": one, "b": one.copy(), "c": one * 2, "unread": one * 3}, (2, 3))
    expected = _run(proto, (2, 3))

    share_equal(proto)

    assert [tensor.name for tensor in proto.graph.initializer] == ["a", "c"]
    assert np.array_equal(_run(proto, (2, 3)), expected)


def _quantized_layer(factor: float = 1.0) -> ModelProto:
    scales = np.linspace(0.01, 0.02, 32, dtype=np.float32)
    arrays = {
        "w": np.random.default_rng(0).integers(-127, 127, (32, 64)).astype(np.int8),
        "ws": scales,
        "wz": np.zeros(32, np.int8),
        "xs": np.array(0.03, np.float32),
        "xz": np.array(128, np.uint8),
        "b": np.arange(32, dtype=np.int32),
        "bs": (np.float32(0.03) * scales * np.float32(factor)).astype(np.float32),
        "bz": np.zeros(32, np.int32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
        helper.make_node("Gemm", ["xd", "wd", "bd"], ["y"], transB=1),
    ]
    return _model(nodes, arrays)


def test_what_quantizers_add_is_shrunk_without_a_changed_bit() -> None:
    proto = _quantized_layer()
    expected, size = _run(proto), proto.ByteSize()

    shrink_quantizers(proto)
    share_equal(proto)

    left = {tensor.name for tensor in proto.graph.initializer}
    assert not left & {"bs", "bz"}
    assert "wz" in left  # 32 bytes are less than a node
    assert _run(proto).tobytes() == expected.tobytes()
    assert proto.ByteSize() < size


def test_a_bias_scale_of_other_bits_is_kept() -> None:
    proto = _quantized_layer(factor=1.5)
    expected = _run(proto)

    shrink_quantizers(proto)

    assert "Mul" not in {node.op_type for node in proto.graph.node}
    assert _run(proto).tobytes() == expected.tobytes()


def _conv_and_norm(*, is_read_twice: bool) -> ModelProto:
    arrays = {"w": _sparse((4, 3, 1, 1), 1.0), **{name: np.ones(4, np.float32) for name in ("s", "b", "m", "v")}}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], name="conv"),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["n"], name="norm"),
        helper.make_node("Add", ["n", "h" if is_read_twice else "n"], ["y"]),
    ]
    return _model(nodes, arrays, (2, 3, 6, 6))


def test_a_batch_norm_that_should_be_folded_is_found() -> None:
    with pytest.raises(ExportError, match="BatchNormalization 'norm' follows Conv 'conv' and was not folded"):
        check_folded(_conv_and_norm(is_read_twice=False), is_frozen=True)

    check_folded(_conv_and_norm(is_read_twice=True), is_frozen=True)
    check_folded(_conv_and_norm(is_read_twice=False), is_frozen=False)


def test_a_weight_that_is_not_zero_where_masked_is_found() -> None:
    model = transform(nn.Sequential(nn.Linear(6, 6)), Config(density=0.5))
    plain = freeze(model)
    check_masked(model, plain)
    check_masked(plain, plain)  # not transformed: no masks

    with torch.no_grad():
        plain.get_parameter("0.weight").fill_(1.0)
    with pytest.raises(ExportError, match=r"0\.weight is not zero where it is masked"):
        check_masked(model, plain)


def test_a_graph_that_onnx_refuses_is_an_error() -> None:
    with pytest.raises(ExportError, match="onnx refuses the encoded graph: "):
        check_graph(_model([helper.make_node("Relu", ["absent"], ["y"])], {}), what="encoded")


@pytest.mark.parametrize(
    ("tensor_bytes", "is_split"), [(0, False), (2**31 - 2**24 - 1, False), (2**31 - 2**24, True), (2**40, True)]
)
def test_size_arithmetic(tensor_bytes: int, is_split: bool) -> None:
    # 2**31 - 1 bytes are what a protobuf message holds, 2**24 are for the graph.
    assert _write.needs_second_file(tensor_bytes) is is_split


def test_the_entropy_bounds() -> None:
    weight = np.zeros((10, 100), np.float32)
    weight[:, :11] = [1.0, *[2.0, -3.0] * 5]
    proto = _twice(weight)

    bounds = entropy_bounds(proto, {})

    # 1000 H(0.11) bits, 110 values of 4 bytes; or of 24 + H(1 / 11) bits, as 1 of 11 has an exponent of its own.
    assert bounds.whole == pytest.approx(1000 * 0.499916 / 8 + 110 * 4, rel=1e-6)
    assert bounds.exponents == pytest.approx(1000 * 0.499916 / 8 + 110 * (24 + 0.439497) / 8, rel=1e-6)


def test_exponents_are_coded_in_the_largest_tensors_that_fit() -> None:
    rng = np.random.default_rng(0)
    weights = {}
    for name, active in (("too many", 23_000), ("most", 12_000), ("no more", 9_000), ("rest", 7_000)):
        weights[name] = np.zeros(125_000, np.float32)
        weights[name][rng.choice(125_000, active, replace=False)] = rng.standard_normal(active)
    proto = _model(
        [helper.make_node("Add", ["x", "rest"], ["y"])], {n: w.reshape(250, 500) for n, w in weights.items()}
    )

    tensors = encode(proto, "packed").tensors

    # 4 % of 500,000 weights are 20,000.
    assert {name for name, tensor in tensors.items() if tensor.exponents is not None} == {"most", "rest"}
