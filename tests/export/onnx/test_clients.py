"""Packed files in runtimes other than the one that checks exports: what each of them insists on, and the numbers."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import fedmef_fx
from fedmef_fx import Config, export_onnx, inspect_onnx
from fedmef_fx.models import digits_cnn

PORTABLE = {
    *("Add", "Cast", "Concat", "ConstantOfShape", "CumSum", "Equal", "Gather", "Less", "Mul", "Reshape"),
    *("ScatterElements", "Slice", "Sub"),
}
Exported = tuple[Path, NDArray[Any], NDArray[Any]]


class Attention(nn.Module):
    """Query, key and value are parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "digits": (digits_cnn, (3, 1, 8, 8)),
    "attention": (Attention, (3, 5, 32)),
}


@pytest.fixture(
    scope="module", params=[f"{name}/{weights}" for name in MODELS for weights in ("packed", "packed-int16")]
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A packed file, an input, and what the model makes of it."""
    name, weights = request.param.split("/")
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = fedmef_fx.transform(factory(), Config(density=0.2), example_inputs=(x,)).eval()
    path = tmp_path_factory.mktemp("clients") / "m.onnx"
    export_onnx(model, path, example_inputs=(x,), weights=weights)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return path, x.numpy(), session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def _agrees(out: Any, expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-4, atol=1e-5)


def test_decoders_are_made_of_operators_that_every_runtime_computes_right(exported: Exported) -> None:
    proto = onnx.load(exported[0])
    decoders = [
        node for node, record in zip(proto.graph.node, inspect_onnx(exported[0]).nodes, strict=True) if record.decodes
    ]
    assert len(decoders) > 10
    assert {node.op_type for node in decoders} <= PORTABLE
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for node in decoders:
        if node.op_type == "CumSum":
            assert constants[node.input[1]].shape == ()
        if node.op_type == "ConstantOfShape":
            assert [attribute.name for attribute in node.attribute] == ["value"]


def test_parts_of_one_tensor_have_names_of_their_own(exported: Exported) -> None:
    graph = onnx.load(exported[0]).graph
    parts = [node for node in graph.node if node.op_type in ("Gather", "Slice")]
    readers = collections.Counter(node.input[0] for node in parts)
    names = [node.name for node in parts if readers[node.input[0]] > 1]
    assert names
    assert all(names)
    assert len(set(names)) == len(names)


def test_a_file_asks_for_no_newer_format_than_its_operators(exported: Exported) -> None:
    proto = onnx.load(exported[0])
    assert proto.ir_version == helper.find_min_ir_version_for(list(proto.opset_import))
    assert proto.ir_version <= 9  # the newest that onnxruntime 1.17 reads


def test_the_reference_evaluator_agrees(exported: Exported) -> None:
    path, x, expected = exported
    evaluator = ReferenceEvaluator(str(path))
    _agrees(evaluator.run(None, {evaluator.input_names[0]: x})[0], expected)  # type: ignore[index]


def test_openvino_agrees(exported: Exported) -> None:
    openvino = pytest.importorskip("openvino")
    path, x, expected = exported
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    _agrees(model([x])[0], expected)


def test_opencv_agrees(exported: Exported) -> None:
    cv2 = pytest.importorskip("cv2")
    path, x, expected = exported
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(x)
    _agrees(network.forward(), expected)


def test_tract_agrees(exported: Exported) -> None:
    tract = pytest.importorskip("tract")
    path, x, expected = exported
    model = tract.onnx().load(str(path))
    model.set_input_fact(0, f"{','.join(map(str, x.shape))},f32")
    _agrees(model.into_model().into_runnable().run([x])[0].to_numpy(), expected)
