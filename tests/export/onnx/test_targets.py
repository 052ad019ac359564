"""Runtimes that a file is meant for."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedmef_fx import ExportReport, export_onnx
from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.onnx import targets

X = torch.linspace(-1.0, 1.0, 128).reshape(2, 64)


def _export(path: Path, target: str, **options: Any) -> ExportReport:
    torch.manual_seed(0)
    return export_onnx(nn.Linear(64, 32), path, example_inputs=(X,), target=target, **options)


@pytest.mark.parametrize("target", ["onnxruntime", "onnxruntime>=1.17", "onnxruntime>=1.17.3", "portable"])
@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_files_are_for_old_and_new_runtimes(tmp_path: Path, target: str, weights: str) -> None:
    report = _export(tmp_path / "m.onnx", target, weights=weights)
    assert any("portable on this machine computes" in notice for notice in report.notices) == (target == "portable")


def test_a_format_that_is_too_new_is_refused(tmp_path: Path) -> None:
    _export(tmp_path / "m.onnx", "onnxruntime")
    proto = onnx.load(tmp_path / "m.onnx")
    proto.ir_version = 10
    with pytest.raises(ExportError, match=r"format version 10; onnxruntime>=1[.]17 reads at most 9"):
        targets.check_format(proto, targets.read_target("onnxruntime>=1.17", weights="dense"))
    proto.ir_version, proto.opset_import[0].version = 9, 22
    with pytest.raises(ExportError, match=r"opset 22; onnxruntime>=1[.]17 reads at most 20"):
        targets.check_format(proto, targets.read_target("onnxruntime>=1.17", weights="dense"))
    proto.opset_import[0].version = 18
    proto.ir_version = 8
    proto.graph.node[0].domain = "com.microsoft"
    with pytest.raises(ExportError, match=r"needs com.microsoft.\w+, which portable does not have"):
        targets.check_format(proto, targets.read_target("portable", weights="dense"))


@pytest.mark.parametrize(
    ("target", "weights", "message"),
    [
        ("tensorrt", "dense", "got target='tensorrt'; expected portable | openvino"),
        ("onnxruntime>=1.10", "dense", "expected onnxruntime 1.14 or later"),
        ("onnxruntime>1.17", "dense", "got target="),
        ("mnn", "packed", "wants weights as constants.*unpack_onnx"),
    ],
)
def test_targets_that_are_not_known_or_do_not_fit(tmp_path: Path, target: str, weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _export(tmp_path / "m.onnx", target, weights=weights)
    assert not (tmp_path / "m.onnx").exists()


def _pretend(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Make a runtime that is installed."""
    module = ModuleType("openvino")
    module.__spec__ = __import__("importlib.machinery", fromlist=["ModuleSpec"]).ModuleSpec("openvino", None)
    monkeypatch.setitem(sys.modules, "openvino", module)
    monkeypatch.setitem(targets._RUNNERS, "openvino", run)


def test_a_runtime_that_computes_something_else_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: str, inputs: dict[str, Any], count: int) -> Sequence[Any]:
        del path, inputs, count
        return [np.full((2, 32), 0.5, np.float32)]

    def fails(path: str, inputs: dict[str, Any], count: int) -> Sequence[Any]:
        raise RuntimeError("no such operator")

    _pretend(monkeypatch, wrong)
    with pytest.raises(ExportError, match="openvino differs from onnxruntime by up to"):
        _export(tmp_path / "m.onnx", "openvino")

    def other_shape(path: str, inputs: dict[str, Any], count: int) -> Sequence[Any]:
        del path, inputs, count
        return [np.zeros((3, 32), np.float32)]

    _pretend(monkeypatch, other_shape)
    with pytest.raises(ExportError, match=r"openvino returns \[3, 32\] for output 'output'; expected \[2, 32\]"):
        _export(tmp_path / "m.onnx", "openvino")
    _pretend(monkeypatch, fails)
    with pytest.raises(ExportError, match="openvino does not run the file: no such operator"):
        _export(tmp_path / "m.onnx", "openvino")
    assert list(tmp_path.iterdir()) == []


def test_a_runtime_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    report = _export(tmp_path / "m.onnx", "openvino")
    unverified = _export(tmp_path / "n.onnx", "openvino", verify=False)
    assert "not tried in openvino, as verify=False: only the format was checked" in unverified.notices
    assert "openvino is not installed here: of openvino only the format was checked" in report.notices
