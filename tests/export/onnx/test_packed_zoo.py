"""Packed weights in every kind of layer: bit-equal to plain storage, close to torch, and folded when it is loaded.

`export_onnx` itself compares the bits; these tests look at what it says about it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, freeze, masks, transform, verify_onnx
from fedmef_fx.models import resnet18

pytestmark = pytest.mark.slow

KEEP = Config(density=0.1, normalization="keep")


def _export(model: nn.Module, path: Path, *inputs: Tensor, **options: Any) -> Any:
    report = export_onnx(model, path, example_inputs=inputs, **{"weights": "packed", **options})
    assert report.tensors
    assert report.runtime.nodes == report.runtime.plain_nodes  # no decoder is left
    assert report.bytes < report.plain_bytes
    verify_onnx(path)
    return report


def _names(report: Any) -> set[str]:
    return {tensor.name for tensor in report.tensors}


class Convolutions(nn.Module):
    """Grouped, depthwise, transposed, 1d and 3d."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 64, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(64, 64, 7, padding=3, groups=64)
        self.norm = nn.BatchNorm2d(64)
        self.transposed = nn.ConvTranspose2d(64, 16, 3, groups=2)
        self.volume = nn.Conv3d(4, 32, 3)
        self.line = nn.Conv1d(32, 64, 5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.weight)  # a negative scale makes -0 of a masked weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depthwise(self.grouped(x))))
        x = self.transposed(x).unflatten(1, (4, 4))
        return self.line(F.relu(self.volume(x)).flatten(2))


def test_convolutions(tmp_path: Path) -> None:
    report = _export(transform(Convolutions(), KEEP), tmp_path / "m.onnx", torch.randn(2, 8, 6, 6))

    assert _names(report) == {f"{n}.weight" for n in ("grouped", "depthwise", "transposed", "volume", "line")}
    assert report.parity.max_abs < 5e-5
    assert report.notices == ()
    file = onnx.load(tmp_path / "m.onnx")
    assert "BatchNormalization" not in {node.op_type for node in file.graph.node}


class Sequences(nn.Module):
    """Attention and a transformer encoder over sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.encoder(x).mean(1))


def test_sequences_of_any_length(tmp_path: Path) -> None:
    tokens = torch.randint(0, 50, (3, 7))
    report = _export(
        transform(Sequences(), KEEP, example_inputs=(tokens,)),
        tmp_path / "m.onnx",
        tokens,
        dynamic_sizes={"tokens": {1: "length"}},
    )

    assert report.parity.max_abs < 5e-5
    assert report.notices == ()
    dims = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param for dim in dims] == ["batch", "length"]
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"tokens": np.zeros((2, 19), np.int64)})[0].shape == (2, 40)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(32, 32, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][:, -1]


def test_a_recurrent_network_has_the_length_of_its_example(tmp_path: Path) -> None:
    # torch.export unrolls the steps of an LSTM.
    report = _export(
        transform(Recurrent(), KEEP), tmp_path / "m.onnx", torch.randn(3, 5, 32), dynamic_sizes={"x": {1: "length"}}
    )

    (notice,) = report.notices
    assert notice.startswith("fixed length, as a varying one fails: ")
    assert set(report.parity.batch_sizes) == {1, 2, 3}
    assert report.parity.max_abs < 5e-5
    dims = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 5, 32]


class TwoInputs(nn.Module):
    """A weight used twice, two inputs, a dictionary and a tuple as results."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 40)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = self.second(F.relu(self.first(x))) + y
        return {"sum": z, "pair": (z * 2, y - 1)}


def test_two_inputs_a_nested_result_and_a_tied_weight(tmp_path: Path) -> None:
    sparse = transform(TwoInputs(), KEEP)
    report = _export(sparse, tmp_path / "m.onnx", torch.randn(2, 40), torch.randn(2, 40))

    assert len(report.tensors) == 1  # stored once
    assert report.tensors[0].active == int((freeze(sparse).get_parameter("first.weight") != 0).sum())
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["x", "y"]
    assert [o.name for o in session.get_outputs()] == ["sum", "pair_0", "pair_1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_are_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    model = transform(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 8)), KEEP).to(dtype)
    report = _export(model, tmp_path / "m.onnx", torch.randn(3, 40).to(dtype))

    name = str(dtype).removeprefix("torch.")
    assert report.notices == (f"converted from {name} to float32: inputs and outputs of the file are float32",)
    assert report.parity.max_abs < 5e-5
    assert next(model.parameters()).dtype == dtype


def test_onnxslim_comes_before_the_encoding(tmp_path: Path) -> None:
    pytest.importorskip("onnxslim")
    net = transform(nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 8)), KEEP)

    report = _export(net, tmp_path / "m.onnx", torch.randn(3, 40), optimize="onnxslim")

    assert _names(report) == {"0.weight", "2.weight"}
    assert report.parity.max_abs < 5e-5


def test_a_residual_network_reaches_its_sizes(tmp_path: Path) -> None:
    network = resnet18()
    network.layer1 = nn.Identity()
    network.layer4, network.fc = nn.Identity(), nn.Linear(256, 10)
    sparse = transform(network, Config(density=0.1))
    report = _export(sparse, tmp_path / "m.onnx", torch.randn(2, 3, 16, 16))

    assert report.plain_bytes / report.bytes > 8.7
    assert report.over_entropy < 0.03
    assert {tensor.name for tensor in report.tensors} < set(masks(sparse))


def test_a_model_that_is_not_transformed_is_packed_as_well(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60))
    with torch.no_grad():
        net[0].weight[torch.rand(60, 60) < 0.9] = 0

    report = _export(net, tmp_path / "m.onnx", torch.randn(2, 60))

    assert _names(report) == {"0.weight"}  # the dense one would not get smaller
