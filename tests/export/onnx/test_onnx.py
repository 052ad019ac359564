"""export_onnx: small files that onnxruntime runs like the model."""

import os
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
    assert report.nodes == len(file.graph.node)
    # torch 2.10 lets the file ask for the batch size, which later ones write into the Reshape.
    assert len([node for node in file.graph.node if node.op_type not in {"Shape", "Concat"}]) == 12
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


def test_carries_no_paths_and_no_metadata_of_the_exporter(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    _export(transform(_trained(digits_cnn())), path, IMAGES)

    data, file = path.read_bytes(), onnx.load(path)

    for trace in (
        str(Path(torch.__file__).parent),
        str(Path(__file__).parents[2]),
        "site-packages",
        ".py",
        "fedmef_fx.ops",
        "pkg.torch",
    ):
        assert trace.encode() not in data
    assert [entry.key for entry in file.metadata_props] == ["fedmef_fx.tensors", "fedmef_fx.sha256"]
    assert not file.graph.value_info
    assert not [node for node in file.graph.node if node.metadata_props or node.doc_string]
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert file.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.slow
def test_a_residual_network_is_no_larger_than_its_dense_original(tmp_path: Path) -> None:
    original = resnet18()
    original.layer3, original.layer4, original.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    _trained(original)
    images = torch.randn(2, 3, 8, 8)
    sparse = _export(transform(original, Config(density=0.2)), tmp_path / "sparse.onnx", images)
    dense = _export(original, tmp_path / "dense.onnx", images)

    assert sparse.bytes <= dense.bytes
    assert sparse.parity.max_abs < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(  # what freezing makes of each with either is in tests/export/freeze
    ("name", "normalization"),
    [
        ("residual", "nsconv"),
        ("residual", "keep"),
        ("depthwise", "nsconv"),
        ("depthwise", "keep"),
        ("mode_dependent", "keep"),
        ("drop_path", "nsconv"),
        ("tied", "keep"),
        ("shared", "nsconv"),
        ("pre_activation", "keep"),
        ("optional", "nsconv"),
        ("conv1d", "keep"),
        ("conv3d", "nsconv"),
        ("linear_norm", "keep"),
    ],
)
def test_zoo(tmp_path: Path, name: str, normalization: str) -> None:
    original, inputs = build(name)
    model = transform(original, Config(density=0.4, normalization=normalization))

    sparse = _export(model, tmp_path / "sparse.onnx", *inputs)

    assert sparse.parity.max_abs < 1e-4
    assert sparse.notices == ()
    assert sparse.parity.batch_sizes[1:4] == (1, 2, 3)


@pytest.mark.slow
def test_opaque_modules(tmp_path: Path) -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recurrent = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x)[0]
            return self.head(self.recurrent(x)[0][:, -1])

    report = _export(transform(Opaque(), Config(density=0.5)), tmp_path / "m.onnx", torch.randn(3, 5, 8))

    assert report.notices == ()
    assert report.parity.max_abs < 1e-5


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


def test_nothing_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _export(Net(lambda y: (y, None)), tmp_path / "m.onnx", X)

    assert capfd.readouterr() == ("", "")
    assert "treespec" not in str(warnings.filters)  # what is left out is left out there only


def test_new_files_get_ordinary_permissions(tmp_path: Path) -> None:
    _export(Net(F.relu), tmp_path / "m.onnx", X, verify=False)
    (tmp_path / "other").touch()

    assert os.stat(tmp_path / "m.onnx").st_mode == os.stat(tmp_path / "other").st_mode
