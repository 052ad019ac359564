"""An ONNX file as a page: modules, tensors with codec and bytes; files from elsewhere with odd names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fedmef_fx
from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.export.onnx.file_records import FileInspection, FileNode, FileTensor
from fedmef_fx.inspection.onnx_page import write_onnx_page
from tests.cli.program import json_of
from tests.inspection.models import named, two_convolutions


def _document(path: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="document">(.*?)</script>', path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return json.loads(text)


def test_a_file_is_a_page(tmp_path: Path) -> None:
    model = transform(named(("a", two_convolutions()), ("b", torch.nn.ReLU())), Config(density=0.25))
    file, page = tmp_path / "net.onnx", tmp_path / "net.html"
    export_onnx(model, file, example_inputs=(torch.ones(2, 1, 8, 8),), weights="packed")
    assert json_of("inspect", str(file), "--html", str(page))["path"] == str(page)
    document = _document(page)
    assert document["title"] == "net.onnx"
    assert document["about"]["command"] == f"fedmef-fx inspect {file} --html {page} --json"
    found = fedmef_fx.inspect_onnx(file)
    assert [entry["parameter"] for entry in document["parameters"]] == [tensor.name for tensor in found.tensors]
    assert [entry["codec"] for entry in document["parameters"]] == [tensor.codec for tensor in found.tensors]
    nodes = document["views"][0]["nodes"]
    assert {"Conv", "Relu"} <= {node["x"] for node in nodes}
    weights = {tensor.name for tensor in found.tensors if tensor.module}
    assert weights <= {node["x"] for node in nodes if node["o"] == "get_attr"}


@pytest.mark.parametrize("name", ["twice", "<script>", ""])
def test_names_of_files_from_elsewhere_may_be_anything(tmp_path: Path, name: str) -> None:
    tensor = FileTensor(name, (2, 2), "f32", "dense", None, 16)
    nodes = (
        FileNode(name, "Add", ("x", name), ("y",), (name,)),
        FileNode(name, "Loop", ("y", "later"), ("z",)),
        FileNode(name, "Relu", ("z", ""), ("later",)),
    )
    found = FileInspection("file.onnx", 100, 18, "", "", None, (tensor,), nodes)
    write_onnx_page(found, tmp_path / "page.html")
    document = _document(tmp_path / "page.html")
    assert [node["x"] for node in document["views"][0]["nodes"] if node["o"] == "call_function"] == [
        "Add",
        "Loop",
        "Relu",
    ]
    assert len({node["n"] for node in document["views"][0]["nodes"]}) == len(document["views"][0]["nodes"])
