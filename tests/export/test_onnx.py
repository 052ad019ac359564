"""export_onnx: files that onnxruntime runs like the model, and errors that leave the old file alone."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, masks, transform
from fedmef_fx.errors import ConfigError, ExportError, FedmefError
from fedmef_fx.export import _parity, onnx_file
from fedmef_fx.models import digits_cnn, resnet18
from tests.models import build


class Net(nn.Module):
    """Any function around one layer."""

    def __init__(self, function: Callable[..., Any], width: int = 6) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(width, width), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


def _export(model: nn.Module, path: Path, *inputs: Tensor, **options: Any) -> Any:
    return export_onnx(model, path, example_inputs=inputs, **options)


def _trained(model: nn.Module) -> nn.Module:
    """A model whose BatchNorms have statistics, which its dense export has to store as biases."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model


X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
IMAGES = torch.linspace(-1.0, 1.0, 5 * 64).reshape(5, 1, 8, 8)


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
def test_digits(tmp_path: Path, normalization: str) -> None:
    original = _trained(digits_cnn())
    model = transform(original, Config(density=0.1, normalization=normalization))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "model.onnx"

    report = _export(model, path, IMAGES)
    dense = _export(original, tmp_path / "dense.onnx", IMAGES)

    file = onnx.load(path)
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in file.graph.initializer}
    assert report.path == path
    assert report.bytes == path.stat().st_size <= dense.bytes
    assert report.dense_bytes == 67_754 * 4
    assert report.nodes == len(file.graph.node) == 12
    assert report.parity.max_abs < 1e-5
    assert report.parity.batch_sizes == (5, 1, 2, 3, 5)
    assert report.parity.top1_agreement == 1.0
    assert report.notices == ()
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert not [node for node in file.graph.node if node.op_type == "BatchNormalization"]
    for name, mask in masks(model).items():
        assert np.array_equal(weights[name] != 0, mask.numpy())
    assert model.training
    assert original.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense.onnx", "model.onnx"]


def test_carries_no_paths_and_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _export(transform(_trained(digits_cnn())), path, IMAGES)

    data, file = path.read_bytes(), onnx.load(path)

    for trace in (
        str(Path(torch.__file__).parent),
        str(Path(__file__).parent.parent),
        "site-packages",
        ".py",
        "fedmef",
    ):
        assert trace.encode() not in data
    assert not file.metadata_props
    assert not file.graph.value_info
    assert not [node for node in file.graph.node if node.metadata_props or node.doc_string]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert file.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_a_residual_network_is_no_larger_than_its_dense_original(tmp_path: Path) -> None:
    original = _trained(resnet18())
    images = torch.randn(2, 3, 8, 8)
    sparse = _export(transform(original, Config(density=0.2)), tmp_path / "sparse.onnx", images)
    dense = _export(original, tmp_path / "dense.onnx", images)

    assert sparse.bytes <= dense.bytes
    assert sparse.parity.max_abs < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "depthwise",
        "mode_dependent",
        "drop_path",
        "tied",
        "shared",
        "pre_activation",
        "optional",
        "conv1d",
        "conv3d",
        "linear_norm",
    ],
)
def test_zoo(tmp_path: Path, name: str, normalization: str) -> None:
    original, inputs = build(name)
    model = transform(original, Config(density=0.4, normalization=normalization))

    sparse = _export(model, tmp_path / "sparse.onnx", *inputs)

    assert sparse.parity.max_abs < 1e-4
    assert sparse.notices == ()
    assert sparse.parity.batch_sizes[1:4] == (1, 2, 3)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    original, inputs = build("tied")
    _export(transform(original, Config(density=0.5)), tmp_path / "tied.onnx", *inputs)

    file = onnx.load(tmp_path / "tied.onnx")
    assert sum(tuple(i.dims) == (6, 6) for i in file.graph.initializer) == 1


class Several(nn.Module):
    """Several inputs and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.words = nn.Linear(6, 6), nn.Embedding(9, 6)

    def forward(
        self, x: Tensor, words: Tensor, scale: float = 2.0, *, extra: Tensor, flag: Tensor | None = None
    ) -> dict[str, Any]:
        y = self.layer(x) + self.words(words)
        return {"x": y * scale, "pair": (y - extra, words + 1, None), "again": y, "two words": y.sum()}


def test_several_inputs_and_a_nested_result(tmp_path: Path) -> None:
    words = torch.tensor([8, 3, 5, 5])
    model = Several()
    # The same tensor twice must not become one input.
    report = export_onnx(
        model, tmp_path / "m.onnx", example_inputs=(X, words, 3.0), example_kwargs={"flag": None, "extra": X}
    )

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "words", "extra"]
    assert [o.name for o in session.get_outputs()] == ["x_out", "pair_0", "pair_1", "again", "two_words"]
    assert report.parity.top1_agreement == 1.0
    assert model.training


def test_a_model_that_fixes_its_batch_size_says_so(tmp_path: Path) -> None:
    net = Net(lambda y: y.reshape(4, 6).cumsum(0))
    report = _export(net, tmp_path / "m.onnx", X)

    (notice,) = report.notices
    assert notice.startswith("fixed batch size 4, as a varying one fails: torch.export cannot trace Net: ")
    assert "constant (4)" in notice
    assert set(report.parity.batch_sizes) == {4}
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


def test_a_fixed_batch_size_on_request(tmp_path: Path) -> None:
    report = _export(Net(F.relu), tmp_path / "m.onnx", X, dynamic_batch=False)

    assert report.notices == ()
    assert set(report.parity.batch_sizes) == {4}


def test_an_example_of_one_sample_is_enough_for_a_dynamic_batch(tmp_path: Path) -> None:
    report = _export(Net(F.relu), tmp_path / "m.onnx", X[:1])

    assert report.notices == ()
    assert report.parity.batch_sizes == (1, 1, 2, 3)


def test_a_scalar_has_no_batch(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    (notice,) = _export(Scaled(), tmp_path / "m.onnx", torch.tensor(2.0)).notices
    assert "no batch dimension" in notice


def test_half_precision(tmp_path: Path) -> None:
    report = _export(Net(F.relu).half(), tmp_path / "m.onnx", X.half())

    assert report.parity.max_abs < 1e-2


def test_verification_can_be_left_out(tmp_path: Path) -> None:
    report = _export(Net(lambda y: F.dropout(y, 0.5, training=True)), tmp_path / "m.onnx", X, verify=False)

    assert report.parity is None
    assert (tmp_path / "m.onnx").exists()


def test_a_relative_path_and_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "m.onnx")

    report = export_onnx(Net(F.relu), "link.onnx", example_inputs=[X], verify=False)

    assert report.path == (tmp_path / "real" / "m.onnx").resolve()
    assert (tmp_path / "link.onnx").is_symlink()
    onnx.checker.check_model("link.onnx")


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
        (Net(torch.special.bessel_j0), ExportError, r"operator prims\.bessel_j0 \(node bessel_j0\) has no ONNX form"),
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


def test_bfloat16_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"layer\.weight is bfloat16, .* export model\.float\(\)"):
        _export(Net(F.relu).bfloat16(), tmp_path / "m.onnx", X.bfloat16())


def test_a_wrong_graph_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_file.freeze

    def broken(model: nn.Module) -> nn.Module:
        plain = original(model)
        plain.get_parameter("layer.bias").data[0] += 0.5
        return plain

    monkeypatch.setattr(onnx_file, "freeze", broken)

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


def test_a_model_beyond_one_file_is_refused_by_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_LARGEST_FILE_BYTES", 100)
    with pytest.raises(ExportError, match=r"the weights take 168 bytes; one ONNX file holds at most 100"):
        _export(Net(F.relu), tmp_path / "m.onnx", X)


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

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(ExportError, match=r"cannot be written: .*Permission denied"):
        _export(Net(F.relu), tmp_path / "m.onnx", X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "packed"}, r"got weights='packed'; expected 'dense'"),
        ({"quantize": "int8"}, r"got quantize='int8'; expected None"),
        ({"example_inputs": X}, r"example_inputs is a Tensor; expected a tuple"),
        ({"example_inputs": (X, X)}, r"do not fit Net\.forward.*got 2 positional"),
        ({"example_kwargs": {"y": X}}, r"do not fit Net\.forward.*\['y'\] keyword"),
        ({"example_inputs": (3,)}, r"got no tensor among the example inputs"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export_onnx(Net(F.relu), tmp_path / "m.onnx", **{"example_inputs": (X,), **options})


def test_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    filters = list(warnings.filters)
    _export(Net(lambda y: (y, None)), tmp_path / "m.onnx", X)

    assert capfd.readouterr() == ("", "")
    assert warnings.filters == filters


def test_new_files_get_ordinary_permissions(tmp_path: Path) -> None:
    _export(Net(F.relu), tmp_path / "m.onnx", X, verify=False)
    (tmp_path / "other").touch()

    assert os.stat(tmp_path / "m.onnx").st_mode == os.stat(tmp_path / "other").st_mode


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
