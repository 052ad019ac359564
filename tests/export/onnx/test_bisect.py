"""When a file computes something else, the error says where that begins."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx import convert as _convert
from fedmef_fx.export.onnx import decode_graph as _decode_graph
from fedmef_fx.export.onnx import onnx_file

X = torch.linspace(-1.0, 1.0, 160).reshape(4, 40)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))).tanh()


def _export(path: Path, **options: Any) -> None:
    export_onnx(transform(Net(), Config(density=0.2)), path, example_inputs=(X,), **options)


def test_a_wrong_translation_is_pinned_to_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _convert.convert

    def broken(*args: Any, **kwargs: Any) -> _convert.Converted:
        converted = original(*args, **kwargs)
        (node,) = (node for node in converted.proto.graph.node if node.op_type == "Relu")
        node.op_type = "Abs"
        return dataclasses.replace(converted)

    monkeypatch.setattr(_convert, "convert", broken)
    with pytest.raises(ExportError, match=r"The first node that differs is Abs '\w+', which computes 'relu': max abs"):
        _export(tmp_path / "m.onnx", weights="packed")
    assert not list(tmp_path.iterdir())


def test_wrong_freezing_is_told_from_wrong_translation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_file.frozen_graph

    def broken(model: nn.Module) -> nn.Module:
        plain = original(model)
        plain.get_parameter("second.bias").data += 0.5
        return plain

    monkeypatch.setattr(onnx_file, "frozen_graph", broken)
    with pytest.raises(ExportError, match="No node differs between the traced program and its translation: freezing"):
        _export(tmp_path / "m.onnx")


def test_a_wrong_decoder_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = _decode_graph.DecodeGraph._arrivals

    def broken(self: _decode_graph.DecodeGraph, steps: str) -> str:
        original(self, steps)
        return self._sums(steps)  # one too far

    monkeypatch.setattr(_decode_graph.DecodeGraph, "_arrivals", broken)
    with pytest.raises(ExportError, match=r"onnxruntime cannot|of the encoded file differs in .*bug of the decoder"):
        _export(tmp_path / "m.onnx", weights="packed")


def test_a_random_model_is_told_as_such(tmp_path: Path) -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True)

    with pytest.raises(ExportError, match=r"returns something else each time it is called.*verify=False"):
        export_onnx(Random(), tmp_path / "m.onnx", example_inputs=(X,))
