"""Looking into ONNX files: what exports hold, what manifests say, and files that lie."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fedmef_fx
from fedmef_fx import Config, inspect_onnx
from fedmef_fx.errors import ExportError
from fedmef_fx.export.freeze import frozen_graph
from tests.inspection.models import HOSTILE_NAMES, two_convolutions

KEY = "fedmef_fx.tensors"
COLUMNS = ["name", "value", "shape", "codec", "active", "bytes", "node"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    sparse = fedmef_fx.transform(two_convolutions(), Config(density=0.3))
    fedmef_fx.export_onnx(sparse, path, example_inputs=(torch.randn(2, 1, 8, 8),), verify=False)
    return sparse, path


def test_an_export_shows_the_densities_of_its_model(exported: tuple[nn.Module, Path]) -> None:
    sparse, path = exported
    inspection = inspect_onnx(path)
    tensors = {tensor.name: tensor for tensor in inspection.tensors}
    for name, mask in fedmef_fx.masks(sparse).items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype, tensor.codec) == (tuple(mask.shape), "f32", "dense")
        # Normalisation can make an active weight exactly 0: a channel with one, or with equal ones.
        assert int(mask.sum()) - mask.shape[0] <= (tensor.active or 0) <= int(mask.sum())
        assert tensor.nbytes == 4 * mask.numel()
    assert inspection.nbytes == path.stat().st_size
    assert inspection.tensor_bytes < inspection.nbytes
    assert not inspection.notices


def test_nodes_know_module_and_traced_node(exported: tuple[nn.Module, Path]) -> None:
    inspection = inspect_onnx(exported[1])
    convolutions = [node for node in inspection.nodes if node.op == "Conv"]
    assert [node.module for node in convolutions] == ["conv1", "conv2"]
    assert [node.weights[0] for node in convolutions] == ["conv1.weight", "conv2.weight"]
    (relu,) = (node for node in inspection.nodes if node.op == "Relu")
    frozen = frozen_graph(exported[0])
    assert {convolutions[0].fx_node, relu.fx_node} <= {node.name for node in frozen.graph.nodes}
    assert f"{relu.outputs[0]} = Relu({convolutions[0].outputs[0]})  # %{relu.fx_node}" in str(inspection)


def test_json_and_notebook(exported: tuple[nn.Module, Path]) -> None:
    inspection = inspect_onnx(exported[1])
    document = json.loads(inspection.to_json())
    assert (document["schema"], document["version"]) == ("fedmef-fx/onnx-file", 1)
    assert document["tensors"][0]["density"] == inspection.tensors[0].density
    assert inspection._repr_html_().count("<table") == 3


def _model(initializers: list[TensorProto], *, manifest: Any = None, decoded: str = "w") -> onnx.ModelProto:
    """y = x @ w, where two nodes make `w` from `values` and `scale` if that is not an initializer."""
    made = decoded not in {tensor.name for tensor in initializers}
    nodes = [
        helper.make_node("Mul", ["values", "scale"], ["scaled"]),
        helper.make_node("Identity", ["scaled"], [decoded]),
    ] * made
    nodes.append(helper.make_node("MatMul", ["x", decoded], ["y"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [1, 2])], [value("y", TensorProto.FLOAT, [1, 3])], initializers
    )
    model = helper.make_model(graph, producer_name="pytorch")
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        model.metadata_props.add(key=KEY, value=text)
    return model


def _packed(*rows: list[Any], **changes: Any) -> onnx.ModelProto:
    arrays = {"values": np.ones((2, 3), np.float32), "scale": np.float32(2)}
    manifest = {"version": 1, "weights": "packed", "quantize": None, "columns": COLUMNS, "rows": rows, **changes}
    return _model([numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()], manifest=manifest)


ROW = ["layer.fc.weight", "w", [2, 3], "rice3/float32", 2, 17, "linear"]


def _write(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_an_encoded_tensor_stands_for_its_pieces(tmp_path: Path) -> None:
    inspection = inspect_onnx(_write(tmp_path, _packed(ROW)))
    (tensor,) = inspection.tensors
    assert (tensor.name, tensor.codec, tensor.density, tensor.nbytes) == ("layer.fc.weight", "rice3/float32", 2 / 6, 17)
    assert tensor.readers == ("MatMul_2",)
    assert [node.decodes for node in inspection.nodes] == ["layer.fc.weight", "layer.fc.weight", ""]
    product = inspection.nodes[-1]
    assert (product.module, product.fx_node, product.weights) == ("layer.fc", "linear", ("layer.fc.weight",))
    assert inspection.weights == "packed"
    assert "1 nodes, 2 more that decode weights" in str(inspection)
    assert "Mul" not in str(inspection).splitlines()[-1].replace("MatMul", "")


def test_a_codec_that_nobody_knows_is_shown_as_it_stands(tmp_path: Path) -> None:
    row = [*ROW[:3], "x-ray\x1b[31m", *ROW[4:]]
    inspection = inspect_onnx(_write(tmp_path, _packed(row)))
    assert inspection.tensors[0].codec == "x-ray\x1b[31m"
    assert "x-ray\\x1b[31m" in inspection.table()


@pytest.mark.parametrize("weights", ["raw", "typed"])
def test_elements_are_counted_however_they_are_stored(tmp_path: Path, weights: str) -> None:
    values = [0.0, 1.0, 0.0, 2.0, -0.0, 3.0]
    raw = np.array(values, np.float32).tobytes() if weights == "raw" else values
    tensor = helper.make_tensor("fc.w", TensorProto.FLOAT, [2, 3], raw, raw=weights == "raw")
    (found,) = inspect_onnx(_write(tmp_path, _model([tensor], decoded="fc.w"))).tensors
    assert (found.active, found.nbytes) == (3, 24)


def _claiming(dims: list[int], *, data_type: int = TensorProto.FLOAT, raw: bytes | None = bytes(24)) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=data_type, dims=dims)
    if raw is not None:
        tensor.raw_data = raw
    return _model([tensor])


@pytest.mark.parametrize(
    "model",
    [
        _claiming([2**40, 2**20]),
        _claiming([2**40, 2**20], raw=None),
        _claiming([-2, -3]),
        _claiming([1] * 1000),
        _claiming([2, 4]),
        _packed(ROW, version=2),
        _packed([*ROW, "more"]),
        _packed(ROW[:-1]),
        _packed(["w", "w", [2, -3], "c", 0, 0, ""]),
        _packed(["w", "w", [2, 3], "c", 7, 0, ""]),
        _packed(["w", "w", "shape", "c", 0, 0, ""]),
        _packed(["w", "w", [2, 3], None, 0, 0, ""]),
        _packed(["w", "nothing", [2, 3], "c", 0, 0, ""]),
        _packed(["w", "y", [2, 3], "c", 0, 0, ""]),
        _packed(ROW, columns=None),
        _packed(ROW, weights=7),
        _model([], manifest="{"),
        _model([], manifest="[" * 100_000),
        _model([], manifest="null"),
        onnx.ModelProto(),
        onnx.ModelProto(ir_version=8),
    ],
)
def test_files_that_lie(tmp_path: Path, model: onnx.ModelProto) -> None:
    path = _write(tmp_path, model)
    with pytest.raises(ExportError) as caught:
        inspect_onnx(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_claims_that_cost_nothing_are_shown(tmp_path: Path) -> None:
    inspection = inspect_onnx(_write(tmp_path, _packed(["w", "w", [10**30], "c", 0, 10**12, ""])))
    assert any("more than the whole file has" in notice for notice in inspection.notices)
    assert inspection.tensors[0].density == 0
    assert "1e+18T" in inspection.table()


def test_data_in_another_file_is_not_opened(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    inspection = inspect_onnx(_write(tmp_path, _model([tensor])))
    assert (inspection.tensors[0].codec, inspection.tensors[0].density) == ("external", None)
    assert any("not opened" in notice for notice in inspection.notices)
    assert "-" in inspection.table()


def test_a_graph_that_cannot_run_is_shown_with_a_notice(tmp_path: Path) -> None:
    (notice,) = inspect_onnx(_write(tmp_path, _model([]))).notices
    assert "reads values, which nothing before it makes" in notice


@given(data=st.binary(max_size=200), cut=st.integers(0, 100))
@settings(max_examples=60)
def test_no_bytes_crash_it(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.onnx"
    good = _packed(ROW).SerializeToString()
    for content in (data, good[: max(len(good) - cut, 0)], good[:cut] + data + good[cut:]):
        path.write_bytes(content)
        try:
            inspection = inspect_onnx(path)
        except ExportError:
            continue
        assert str(inspection)
        assert inspection.table()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_stay_in_their_place(tmp_path: Path, name: str) -> None:
    tensor = helper.make_tensor(f"{name}.weight", TensorProto.FLOAT, [2, 3], [1.0] * 6)
    model = _model([tensor], decoded=f"{name}.weight")
    model.graph.node[0].name = name
    model.producer_name = name
    inspection = inspect_onnx(_write(tmp_path, model))
    assert inspection.nodes[0].module == name
    for text in (str(inspection), inspection.table()):
        assert all(line.isprintable() for line in text.splitlines())
    assert len(inspection.table().splitlines()) == 3
    assert "<script" not in inspection._repr_html_() + inspection.to_json()


def test_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.onnx", "\0"):
        with pytest.raises(ExportError, match="cannot be read"):
            inspect_onnx(path)
