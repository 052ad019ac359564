"""export_onnx: errors that say what to do, come early where they can, and leave the old file alone."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.errors import ConfigError, ExportError, FedmefError
from fedmef_fx.export.onnx import onnx_file
from fedmef_fx.export.onnx import parity as _parity
from fedmef_fx.export.onnx.convert import constant_size

X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)


class Net(nn.Module):
    """Any function around one layer."""

    def __init__(self, function: Callable[..., Any], width: int = 6) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(width, width), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


def _export(model: nn.Module, path: Path, *inputs: Tensor, **options: Any) -> Any:
    return export_onnx(model, path, example_inputs=inputs, **options)


class Diverged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        nn.init.constant_(self.layer.bias, float("nan"))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (Diverged(), ExportError, r"layer\.bias has 6 of 6 values that are NaN or infinite"),
        (
            Net(torch.special.bessel_j0),
            ExportError,
            r"operator prims\.bessel_j0 \(node bessel_j0, test_onnx_errors\.py:\d+: return self\..*no ONNX form",
        ),
        (Net(lambda y: y if y.sum() > 0 else -y), ExportError, r"torch\.export cannot trace Net: "),
        (Net(F.relu).bfloat16(), ConfigError, r"Net itself fails on the example inputs \(torch\.float32\[4, 6\]\)"),
        (Net(F.relu, width=7), ConfigError, r"Net itself fails on the example inputs \(torch\.float32\[4, 6\]\)"),
        (
            Net(lambda y: F.dropout(y, 0.5, training=True)),
            ExportError,
            r"output 'output' with batch size 4: onnxruntime differs from torch by up to \S+ \(max abs error\)",
        ),
    ],
)
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, model: nn.Module, error: type[FedmefError], message: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    with pytest.raises(error, match=message):
        _export(model, path, X)

    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert model.training


def test_a_wrong_graph_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_file.frozen_graph

    def broken(model: nn.Module) -> nn.Module:
        plain = original(model)
        plain.get_parameter("layer.bias").data[0] += 0.5
        return plain

    monkeypatch.setattr(onnx_file, "frozen_graph", broken)

    with pytest.raises(ExportError, match=r"output 'output' with batch size 4: .* up to 0\.5 \(max abs error\)"):
        _export(transform(Net(torch.neg), Config(density=0.5)), tmp_path / "m.onnx", X)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"could not be written: .*No space left on device.*is as it was"):
        _export(Net(F.relu), path, X)

    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def _no_export(*_: object, **__: object) -> None:
    pytest.fail("a bad path is found before the work is done")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/m.onnx", r"there is no directory .*missing; create it first: mkdir -p"),
        ("folder", r"folder: is a directory; expected the name of a file"),
        ("read_only/m.onnx", r"the directory .*read_only is read-only"),
        ("zero\0byte", r"cannot be written: .*expected a file name"),
        ("n" * 300, r"cannot be written: .*[Nn]ame too long"),
    ],
)
def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(torch.export, "export", _no_export)
    (tmp_path / "folder").mkdir()
    (tmp_path / "read_only").mkdir(mode=0o555)

    with pytest.raises(ExportError, match=f"export_onnx: .*{message}"):
        _export(Net(F.relu), tmp_path / name, X)


def test_a_file_system_that_refuses_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(ExportError, match=r"cannot be written: .*Permission denied"):
        _export(Net(F.relu), tmp_path / "m.onnx", X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": "sparse"},
            r"got weights='sparse'; expected 'dense' \| 'packed' \| 'packed-int16' \| 'packed-fp16'",
        ),
        ({"quantize": "int4"}, r"got quantize='int4'; expected None \| 'int8'"),
        ({"optimize": "all"}, r"got optimize='all'; expected 'none' \| 'onnxscript' \| 'onnxslim'"),
        ({"example_inputs": X}, r"example_inputs is a Tensor; expected a tuple"),
        ({"example_inputs": (X, X)}, r"do not fit Net\.forward.*got 2 positional"),
        ({"example_kwargs": {"y": X}}, r"do not fit Net\.forward.*\['y'\] keyword"),
        ({"example_inputs": (3,)}, r"got no tensor among the example inputs"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(Net(F.relu), tmp_path / "m.onnx", **{"example_inputs": (X,), **options})


def test_infinities_and_nan_of_the_outputs_are_compared() -> None:
    tally = _parity._Tally()
    special = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)

    tally.compare("y", special, special.copy(), batch_size=1)
    assert tally.max_abs == 0.0
    for wrong in ([[0.0, np.inf, -np.inf, 1.0]], [[np.nan, -np.inf, -np.inf, 1.0]], [[np.nan, np.inf, 3.0, 1.0]]):
        with pytest.raises(ExportError, match=re.escape("output 'y' with batch size 1")):
            tally.compare("y", special, np.array(wrong, np.float32), batch_size=1)
    with pytest.raises(ExportError, match="1 of 2 elements differ"):
        tally.compare("y", np.array([1, 2]), np.array([1, 3]), batch_size=1)
    with pytest.raises(ExportError, match=r"returns int64\[2\], torch int64\[2, 1\]"):
        tally.compare("y", np.array([[1], [2]]), np.array([1, 3]), batch_size=1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"y": {1: "n"}}, r"names 'y', which is no tensor argument; expected one of 'x'"),
        ({"x": {0: "n"}}, r"holds 0: 'n'; expected a dimension in \[1\]"),
        ({"x": {2: "n"}}, r"holds 2: 'n'; expected a dimension in \[1\]"),
        ({"x": {1: "batch"}}, r"holds 1: 'batch'; .* a name other than 'batch'"),
        ({"x": {1: "no name"}}, r"holds 1: 'no name'"),
    ],
)
def test_bad_dynamic_sizes(tmp_path: Path, sizes: dict[str, dict[int, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _export(Net(F.relu), tmp_path / "m.onnx", X, dynamic_sizes=sizes)


def test_a_size_that_became_a_number_is_found() -> None:
    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Net(F.relu), (X,), dynamic_shapes=shapes)
    assert constant_size(program) is None

    (x,) = [node for node in program.graph.find_nodes(op="placeholder") if node.name == "x"]
    torch._check(x.meta["val"].shape[0] == 4)  # what a translation does that works for one size only
    assert constant_size(program) == "size 0 of 'x' the constant 4"


def test_a_size_of_one_cannot_vary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dimension 1 of 'x' has size 1 in the example; expected at least 2"):
        _export(Net(F.relu, width=1), tmp_path / "m.onnx", torch.zeros(3, 1), dynamic_sizes={"x": {1: "n"}})
