"""Weights beyond what one file holds go to a second one; whatever fails, an old pair stays as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from fedmef_fx import export_onnx, verify_onnx
from fedmef_fx.errors import ExportError
from fedmef_fx.export.onnx import write as _write

X = torch.linspace(-1.0, 1.0, 128).reshape(2, 64)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_write, "needs_second_file", lambda tensor_bytes: tensor_bytes > 4096)


def _export(path: Path, width: int = 64, **options: Any) -> Any:
    return export_onnx(nn.Linear(64, width), path, example_inputs=(X,), **options)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_large_model_is_two_files_that_belong_together(tmp_path: Path) -> None:
    report = _export(tmp_path / "m.onnx")

    model, data = sorted(tmp_path.iterdir(), key=lambda p: p.suffix, reverse=True)
    assert (model.name, data.suffix) == ("m.onnx", ".data")
    assert report.bytes == model.stat().st_size + data.stat().st_size
    assert data.stat().st_size == 64 * 64 * 4
    assert report.parity.max_abs < 1e-5
    verify_onnx(model)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert session.run(None, {session.get_inputs()[0].name: X.numpy()})[0].shape == (2, 64)

    damaged = bytearray(data.read_bytes())
    damaged[100] ^= 1
    data.write_bytes(damaged)
    with pytest.raises(ExportError, match=r"m-\w{12}\.data has 16,384 bytes with digest .*, expected 16,384 bytes"):
        verify_onnx(model)
    data.unlink()
    with pytest.raises(ExportError, match=r"its second file cannot be read: .*copy both files"):
        verify_onnx(model)


def test_a_new_model_takes_the_place_of_both(tmp_path: Path) -> None:
    _export(tmp_path / "m.onnx")
    before = _names(tmp_path)

    _export(tmp_path / "m.onnx")  # other random weights
    assert len(_names(tmp_path)) == 2
    assert _names(tmp_path) != before
    _export(tmp_path / "m.onnx", width=4)  # fits in one file
    assert _names(tmp_path) == ["m.onnx"]


def test_a_disk_that_fills_up_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _export(tmp_path / "m.onnx")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match="No space left on device"):
        _export(tmp_path / "m.onnx")

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_model_that_packs_into_one_file_needs_no_second(tmp_path: Path) -> None:
    net = nn.Linear(64, 64)
    with torch.no_grad():
        net.weight[torch.from_numpy(np.random.default_rng(0).random((64, 64))) < 0.9] = 0

    export_onnx(net, tmp_path / "m.onnx", example_inputs=(X,), weights="packed")

    assert _names(tmp_path) == ["m.onnx"]
