"""int8: quantized with the user's data, composed with the encoding, the same bits as plain QDQ."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.export.examples import read_examples
from fedmef_fx.export.onnx.calibration import calibration_calls, check_batch_sizes

SHAPE = (3, 8, 8)


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same quantized model, stored plainly and encoded."""
    torch.manual_seed(0)
    model = transform(_net(), Config(density=0.1))
    folder = tmp_path_factory.mktemp("int8")
    data = [torch.randn(4, *SHAPE) for _ in range(3)]
    reports = {
        weights: export_onnx(
            model,
            folder / f"{weights}.onnx",
            example_inputs=(data[0],),
            weights=weights,
            quantize="int8",
            calibration_data=iter(data),
        )
        for weights in ("dense", "packed")
    }
    assert not logging.getLogger().filters
    return {**reports, "handlers": list(logging.getLogger().handlers)}


def _outputs(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"input": x})[0]
    return found


def test_encoding_changes_no_bit(files: dict[str, Any]) -> None:
    x = np.random.default_rng(1).standard_normal((7, *SHAPE)).astype(np.float32)

    dense, packed = (_outputs(files[name].path, x) for name in ("dense", "packed"))

    assert dense.tobytes() == packed.tobytes()
    assert np.abs(dense).max() > 0


def test_decoders_and_zero_points_are_folded(files: dict[str, Any]) -> None:
    runtime = files["packed"].runtime

    assert runtime.nodes == runtime.plain_nodes
    assert files["packed"].plain_nodes < runtime.plain_nodes + 8


def test_weights_are_symmetric_and_activations_unsigned(files: dict[str, Any]) -> None:
    graph = onnx.load(files["dense"].path).graph
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and arrays.get(n.input[0]) is not None]
    layers = [n for n in weights if arrays[n.input[0]].dtype == np.int8]

    assert len(layers) == 3
    for node in layers:
        weight, scale, zero = (arrays[name] for name in node.input)
        assert not zero.any()
        assert scale.size == weight.shape[0]  # per output channel
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            assert arrays[node.input[2]].dtype == np.uint8


def test_packed_int8_is_the_smallest(files: dict[str, Any]) -> None:
    dense, packed = files["dense"], files["packed"]

    assert packed.bytes < dense.bytes < dense.plain_bytes
    # The two large weights; the others have too few elements to pay for a decoder.
    assert {t.codec.partition("/")[2] for t in packed.tensors} == {"int8"}
    assert "3.weight" in {t.name for t in packed.tensors}


def test_agreement_is_reported(files: dict[str, Any]) -> None:
    parity = files["packed"].parity

    assert 0 < parity.max_rel < 0.2  # of 8 bits, on an untrained network
    assert parity.top1_agreement is not None
    assert parity.batches == 5 + 3  # the calibration data too


X = torch.randn(2, 6)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return x + y * scale


def test_one_input_may_be_a_tensor_or_a_tuple() -> None:
    examples = read_examples(nn.Identity(), (X,), None)
    for data in ([X, X], [(X,), [X]], (X, X), iter([X, torch.randn(5, 6)])):
        calls = calibration_calls(nn.Identity(), "int8", data, examples)
        assert calls is not None
        assert [call.tensors()[0].shape[1] for call in calls] == [6, 6]
    one = calibration_calls(nn.Identity(), "int8", X, examples)
    assert one is not None
    assert len(one) == 1


def test_several_inputs_are_tuples() -> None:
    examples = read_examples(TwoInputs(), (X, X), {"scale": 2.0})
    for data in ([(X, X)], (X, X)):
        (call,) = calibration_calls(TwoInputs(), "int8", data, examples) or []
        assert len(call.tensors()) == 2
        assert call.kwargs == {"scale": 2.0}


def test_a_fixed_batch_size_holds_for_the_data_too() -> None:
    examples = read_examples(nn.Identity(), (X,), None)
    calls = calibration_calls(nn.Identity(), "int8", [X, torch.randn(5, 6)], examples) or []

    check_batch_sizes(calls, examples, is_dynamic=True)
    check_batch_sizes(calls[:1], examples, is_dynamic=False)
    with pytest.raises(ConfigError, match=r"calibration_data\[1\] has sizes \[\(5, 6\)\]; the file has fixed sizes"):
        check_batch_sizes(calls, examples, is_dynamic=False)


@pytest.mark.parametrize(
    ("quantize", "data", "message"),
    [
        (None, [X], "got calibration_data without quantize"),
        ("int8", None, "needs inputs like those that Identity will see"),
        ("int8", [], "calibration_data is empty"),
        ("int8", {"x": X}, "calibration_data is a dict; expected calls"),
        ("int8", 3, "calibration_data is a int; expected calls"),
        ("int8", [3], r"calibration_data\[0\] is a int; expected a tensor"),
        ("int8", [X, (X, torch.tensor(1))], r"\[1\] has 2 arguments with 2 tensors; .*Leave labels out"),
        ("int8", [X[:, :3]], r"\[0\]: input 0 is torch\.float32\[2, 3\]; expected torch\.float32\[batch, 6\]"),
        ("int8", [X[0]], r"\[0\]: input 0 is torch\.float32\[6\]; expected torch\.float32\[batch, 6\]"),
        ("int8", [X.double()], r"\[0\]: input 0 is torch\.float64\[2, 6\]; expected torch\.float32\[batch, 6\]"),
        ("int8", [X, X * float("nan")], r"\[1\]: input 0 is empty, or has values that are NaN"),
        ("int8", [X[:0]], r"\[0\]: input 0 is empty"),
    ],
)
def test_bad_calibration_data(quantize: str | None, data: Any, message: str) -> None:
    examples = read_examples(nn.Identity(), (X,), None)
    with pytest.raises(ConfigError, match=message):
        calibration_calls(nn.Identity(), quantize, data, examples)


@pytest.mark.parametrize("kind", ["pairs", "inputs", "dictionaries"])
def test_a_data_loader_calibrates_with_its_inputs_alone(kind: str) -> None:
    inputs, labels = torch.arange(30.0).reshape(5, 6), torch.arange(5)
    rows: dict[str, Any] = {
        "pairs": TensorDataset(inputs, labels),
        "inputs": inputs,
        "dictionaries": [{"labels": y, "input": x} for x, y in zip(inputs, labels, strict=True)],
    }
    examples = read_examples(nn.Identity(), (X,), None)
    calls = calibration_calls(nn.Identity(), "int8", DataLoader(rows[kind], batch_size=2), examples)
    assert calls is not None
    assert torch.equal(torch.cat([call.args[0] for call in calls]), inputs)
    assert {len(call.args) for call in calls} == {1}


def test_a_data_loader_without_the_inputs_is_refused() -> None:
    examples = read_examples(nn.Identity(), (X,), None)
    with pytest.raises(ConfigError, match=r"calibration_data\[0\] is a dict"):
        calibration_calls(nn.Identity(), "int8", DataLoader([{"pixels": torch.ones(6)}]), examples)
