"""The dense form of packed files, and decoders that are not what a manifest says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import nn

import fedmef_fx
from fedmef_fx import Config, export_onnx, unpack_onnx, verify_onnx
from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx.digest import seal
from fedmef_fx.models import digits_cnn

X = torch.linspace(-1.0, 1.0, 4 * 64).reshape(4, 1, 8, 8)
KEY = "fedmef_fx.tensors"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return fedmef_fx.transform(digits_cnn(), Config(density=0.2))


@pytest.fixture(scope="module")
def packed_file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its packed file, which nobody changes."""
    path = tmp_path_factory.mktemp("packed") / "packed.onnx"
    export_onnx(model, path, example_inputs=(X,), weights="packed", verify=False)
    return path


def _run(path: Path) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return list(session.run(None, {session.get_inputs()[0].name: X.numpy()}))


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "packed"},
        {"weights": "packed-int16"},
        {"weights": "packed", "quantize": "int8", "calibration_data": [X]},
        {"weights": "dense"},
    ],
    ids=["float32", "int16", "int8", "dense"],
)
def test_the_dense_form_has_constants_and_the_same_bits(
    model: nn.Module, tmp_path: Path, options: dict[str, Any]
) -> None:
    packed, dense = tmp_path / "packed.onnx", tmp_path / "dense.onnx"
    export_onnx(model, packed, example_inputs=(X,), **options)
    tensors = [row.name for row in verify_onnx(packed).tensors]
    unpacked = unpack_onnx(packed, dense)
    assert list(unpacked.tensors) == tensors
    assert bool(tensors) == (options["weights"] != "dense")
    assert unpacked.bytes == dense.stat().st_size
    assert unpacked.packed_bytes == packed.stat().st_size
    assert verify_onnx(dense).tensors == ()
    proto = onnx.load(dense)
    made = {name for node in proto.graph.node for name in node.output}
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul", "DequantizeLinear")]
    assert all(name not in made for node in layers if node.op_type == "DequantizeLinear" for name in node.input[1:])
    if not options.get("quantize"):
        assert all(node.input[1] not in made for node in layers)
    for left, right in zip(_run(packed), _run(dense), strict=True):
        assert left.tobytes() == right.tobytes()


def test_weights_have_the_names_and_bits_of_a_dense_export(model: nn.Module, tmp_path: Path) -> None:
    export_onnx(model, tmp_path / "a.onnx", example_inputs=(X,), weights="packed")
    export_onnx(model, tmp_path / "b.onnx", example_inputs=(X,), weights="dense")
    names = unpack_onnx(tmp_path / "a.onnx", tmp_path / "c.onnx").tensors
    unpacked, exported = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / name).graph.initializer}
        for name in ("c.onnx", "b.onnx")
    )
    assert len(names) > 2
    for name in names:
        assert unpacked[name].tobytes() == exported[name].tobytes()


def _rewritten(path: Path, folder: Path, change: Callable[[ModelProto], None]) -> Path:
    """The file with a change and a digest that fits it."""
    proto = onnx.load(path)
    digest = next(entry for entry in proto.metadata_props if entry.key == "fedmef_fx.sha256")
    proto.metadata_props.remove(digest)
    change(proto)
    hostile = folder / "hostile.onnx"
    hostile.write_bytes(seal(proto.SerializeToString()))
    return hostile


def _manifest(proto: ModelProto) -> Any:
    return next(entry for entry in proto.metadata_props if entry.key == KEY)


def _claims_other_shape(proto: ModelProto) -> None:
    entry = _manifest(proto)
    document = json.loads(entry.value)
    at = document["columns"].index("shape")
    document["rows"][0][at] = [1, *document["rows"][0][at]]
    entry.value = json.dumps(document)


def _names_a_value_that_runs(proto: ModelProto) -> None:
    entry = _manifest(proto)
    document = json.loads(entry.value)
    document["rows"][0][document["columns"].index("value")] = proto.graph.output[0].name
    entry.value = json.dumps(document)


def _makes_a_huge_tensor(proto: ModelProto) -> None:
    value = json.loads(_manifest(proto).value)["rows"][0][1]
    (maker,) = (node for node in proto.graph.node if value in node.output)
    sizes = numpy_helper.from_array(np.array([1 << 20, 1 << 20], np.int64), "sizes")
    proto.graph.initializer.append(sizes)
    at = list(proto.graph.node).index(maker)
    nodes = [helper.make_node("ConstantOfShape", ["sizes"], ["huge"]), maker]
    proto.graph.node.insert(at, nodes[0])
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int32), "first"))
    proto.graph.node.insert(at + 1, helper.make_node("Gather", ["huge", "first"], ["row"]))
    proto.graph.output.append(helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, None))


def _repeats_a_table(proto: ModelProto) -> None:
    """Each step makes 64 times as much of the step before."""
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((64, 64), np.int64), "table"))
    name = "table"
    for step in range(4):
        proto.graph.node.insert(step, helper.make_node("Gather", ["table", name], [f"step{step}"]))
        name = f"step{step}"
    proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))


def _reads_beyond_a_table(proto: ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "short"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([9], np.int64), "beyond"))
    proto.graph.node.insert(0, helper.make_node("Gather", ["short", "beyond"], ["taken"]))
    proto.graph.output.append(helper.make_tensor_value_info("taken", onnx.TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_reads_beyond_a_table, "its decoders cannot be run|onnxruntime cannot load"),
        (_claims_other_shape, r"its manifest says \(1, "),
        (_names_a_value_that_runs, "it depends on input|no decoder makes it"),
        (_makes_a_huge_tensor, "its decoders would make .* bytes; expected at most"),
        (_repeats_a_table, "its decoders would make .* bytes; expected at most"),
    ],
)
def test_hostile_decoders_are_refused_before_they_run(
    packed_file: Path, tmp_path: Path, change: Callable[[ModelProto], None], message: str
) -> None:
    hostile = _rewritten(packed_file, tmp_path, change)
    target = tmp_path / "dense.onnx"
    target.write_bytes(b"before")
    with pytest.raises(ExportError, match=message):
        unpack_onnx(hostile, target)
    assert target.read_bytes() == b"before"


def test_a_damaged_source_and_a_bad_target_are_refused(packed_file: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.onnx"
    packed.write_bytes(packed_file.read_bytes())
    with pytest.raises(ExportError, match="nowhere"):
        unpack_onnx(packed, tmp_path / "nowhere" / "b.onnx")
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(ExportError, match="no digest"):
        unpack_onnx(packed, tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()
