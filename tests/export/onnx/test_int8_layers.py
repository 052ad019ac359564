"""int8 layer by layer: what it costs, which layers stay float32, how ranges are taken, layers called several times."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.export.onnx.int8_ranges import entropy_range, percentile_range


class Uneven(nn.Module):
    """The second layer reads one channel that is a thousand times larger than the others, and undoes it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.activation, self.head = activation, nn.Linear(16, 10)
        with torch.no_grad():
            self.first.weight[3] *= 1000
            self.second.weight[:, 3] /= 1000

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.second(self.activation(self.first(x))))
        return self.head(self.activation(self.third(x)).mean((2, 3)))  # type: ignore[no-any-return]


DATA = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (8, 6, 3)]


def _export(path: Path, model: nn.Module, data: list[Tensor] | None = None, **options: Any) -> Any:
    data = data or DATA
    return export_onnx(model.eval(), path, example_inputs=(data[0],), quantize="int8", calibration_data=data, **options)


def _error(path: Path, model: nn.Module, data: list[Tensor]) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.cat(data)
    with torch.no_grad():
        expected = model(x)
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    return float((got - expected).pow(2).mean().sqrt() / expected.std())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Hardtanh(-1.0, 500.0)], ids=["relu", "clip"])
def test_the_costliest_layer_stays_float32(tmp_path: Path, activation: nn.Module) -> None:
    model = Uneven(activation)
    report = _export(tmp_path / "m.onnx", model)

    kinds = {layer.name: layer.kind for layer in report.layers}
    assert kinds["second"] == "float32"
    assert kinds["first"] == kinds["third"] == kinds["head"] == "int8"
    errors = {layer.name: layer.error for layer in report.layers}
    assert errors["second"] == max(errors.values()) > 0.05
    assert any("float32 stays in second (" in notice for notice in report.notices)
    assert "second" in str(report)
    assert _error(tmp_path / "m.onnx", model, DATA) < 0.05
    weights = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert "second.weight" in weights
    assert "third.weight_quantized" in weights


def test_layers_are_chosen_by_hand(tmp_path: Path) -> None:
    model = Uneven(nn.ReLU())
    report = _export(tmp_path / "m.onnx", model, float32_layers=())
    assert {layer.kind for layer in report.layers} == {"int8"}
    assert {layer.error for layer in report.layers} == {None}
    assert _error(tmp_path / "m.onnx", model, DATA) > 0.05

    report = _export(tmp_path / "m.onnx", model, float32_layers=["second", "head"])
    assert {layer.name for layer in report.layers if layer.kind == "float32"} == {"second", "head"}
    assert _error(tmp_path / "m.onnx", model, DATA) < 0.02
    with pytest.raises(ConfigError, match=r"float32_layers names \['fourth'\]; expected some of .*'second'"):
        _export(tmp_path / "m.onnx", model, float32_layers=["fourth"])
    with pytest.raises(ConfigError, match=r"got float32_layers='second'; expected 'auto' or names"):
        _export(tmp_path / "m.onnx", model, float32_layers="second")


def test_float32_layers_are_packed_like_others(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten())
    sparse = transform(model, Config(density=0.1, ignore=()))
    dense, packed = (
        _export(tmp_path / f"{weights}.onnx", sparse, weights=weights, float32_layers=["2"])
        for weights in ("dense", "packed")
    )

    assert {tensor.codec.partition("/")[2][:4] for tensor in packed.tensors if tensor.name == "2.weight"} == {"floa"}
    assert packed.bytes < dense.bytes / 3
    x = {"input": DATA[1].numpy()}
    outputs = [
        onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"]).run(None, x)[0]
        for report in (dense, packed)
    ]
    assert outputs[0].tobytes() == outputs[1].tobytes()


class Thrice(nn.Module):
    """One layer, three ranges."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(100 * x).relu() / 100 + self.layer(x).relu() + 10 * self.layer(x / 100).relu()
        return self.head(y.flatten(2).mean(2) if y.dim() == 4 else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_each_call_of_a_layer_has_a_range_of_its_own(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = Thrice(nn.Conv2d(3, 16, 3) if kind == "conv" else nn.Linear(192, 16))
    data = DATA if kind == "conv" else [x.flatten(1) for x in DATA]
    report = _export(tmp_path / "m.onnx", model, data, float32_layers=())

    assert [layer.name for layer in report.layers].count("layer") == 3
    assert _error(tmp_path / "m.onnx", model, data) < 0.05
    graph = onnx.load(tmp_path / "m.onnx").graph
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm") and "layer" in node.input[1]]
    makers = {node.output[0]: node for node in graph.node}
    scales = [makers[node.input[0]].input[1] for node in layers]
    assert len(set(scales)) == 3
    # The bias is in units of the input's scale, so that no two calls can share it.
    assert len({node.input[2] for node in layers}) == 3


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_ranges_leave_out_what_is_rare(tmp_path: Path, method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    data = [torch.randn(200, 3, 8, 8), *DATA]
    data[0][0, 0, 0, 0] = 1000.0

    _export(tmp_path / "minmax.onnx", model, data, float32_layers=())
    _export(tmp_path / "other.onnx", model, data, float32_layers=(), calibration_method=method)

    assert 5 * _error(tmp_path / "other.onnx", model, DATA) < _error(tmp_path / "minmax.onnx", model, DATA)


def test_an_unknown_method_is_refused(tmp_path: Path) -> None:
    message = re.escape("got calibration_method='mean'; expected 'minmax' | 'percentile' | 'entropy'")
    with pytest.raises(ConfigError, match=message):
        _export(tmp_path / "m.onnx", Uneven(nn.ReLU()), calibration_method="mean")


def test_the_range_of_a_percentile_is_that_of_the_values() -> None:
    counts = np.zeros(10, np.int64)
    counts[[0, 4, 5, 9]] = 1, 500, 498, 1
    assert percentile_range(counts, 0.0, 10.0, left_out=0.0) == (0.0, 10.0)
    assert percentile_range(counts, 0.0, 10.0, left_out=0.01) == (4.0, 6.0)


def test_entropy_keeps_what_is_spread_evenly_and_cuts_a_lonely_outlier() -> None:
    even = np.full(2048, 100)
    assert entropy_range(even, -1.0, 1.0)[1] > 0.9
    peaked = np.zeros(2048, np.int64)
    peaked[:256] = np.exp(-np.arange(256) / 60.0) * 10_000
    peaked[-1] = 1
    low, high = entropy_range(peaked, -0.2, 8.0)
    assert low == -0.2
    assert 0.2 < high < 4.0


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", [{"dilation": 2}, {"groups": 16}, {"kernel_size": 4}], ids=str)
def test_padding_in_words_is_right_in_8_bits(tmp_path: Path, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    last = nn.Conv2d(16, 32, padding="same", **{"kernel_size": 3, **options})  # type: ignore[arg-type]  # integers
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding="valid"), nn.ReLU(), last, nn.ReLU(), nn.Flatten())
    _export(tmp_path / "m.onnx", model, float32_layers=(), verify=False)
    assert _error(tmp_path / "m.onnx", model, DATA) < 0.03
