"""fit: a trained model to a file within limits, in size and time, or a report of what is missed."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedmef_fx import FitReport, export_onnx, fit, unpack_onnx
from fedmef_fx.data import load_digits
from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.fitting.densities import density_within, packed_bytes
from fedmef_fx.fitting.samples import Batch
from fedmef_fx.fitting.sensitivity import keep_shares, scan
from fedmef_fx.models import digits_cnn


def _trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def _accuracy(path: Path, test: TensorDataset) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images, labels = test.tensors
    scores = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    return float((scores.argmax(1) == labels.numpy()).mean())


def test_digits_fit_into_a_tenth_of_the_bytes(tmp_path: Path) -> None:
    train, test = load_digits()
    torch.manual_seed(0)
    model = _trained(digits_cnn(), *train.tensors, epochs=5)
    before = copy.deepcopy(model.state_dict())
    dense = export_onnx(
        model, tmp_path / "dense.onnx", example_inputs=(test.tensors[0][:2],), weights="dense", verify=False
    )

    small, report = fit(
        model,
        train,
        evaluation=test,
        max_bytes=dense.bytes // 10,
        forms=["packed-int8"],
        epochs=6,
        batch_size=128,
        learning_rate=2e-3,
        path=tmp_path / "small.onnx",
    )

    assert report.fits
    assert (tmp_path / "small.onnx").stat().st_size == report.result.bytes <= dense.bytes // 10
    accuracy = _accuracy(tmp_path / "small.onnx", test)
    assert accuracy == pytest.approx(report.result.score, abs=1e-9)
    assert accuracy >= _accuracy(tmp_path / "dense.onnx", test) - 0.01
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(small) is type(model)
    assert {layer.name for layer in report.sensitivity} >= {
        name for name, p in small.named_parameters() if p.dim() == 4
    }
    json.dumps(report.as_dict())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _points() -> TensorDataset:
    x = torch.randn(400, 16)
    return TensorDataset(x, x[:, :3].argmax(1))


def _fit(**options: object) -> tuple[nn.Module, FitReport]:
    data = _points()
    model = _trained(Small(), *data.tensors, epochs=4)
    return fit(model, data, **{"epochs": 2, "batch_size": 100, **options})


def test_channels_shrink_the_module_itself() -> None:
    small, report = _fit(max_bytes=12_000, forms=["channel"])

    assert report.fits
    assert report.result.form == "channel"
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in Small().parameters()) / 2


def test_a_limit_that_cannot_be_kept_is_named_with_its_excess() -> None:
    _, report = _fit(max_bytes=500, forms=["int8"])

    assert not report.fits
    assert report.result.misses == (
        f"max_bytes by {report.result.bytes - 500:,} bytes ({report.result.bytes / 500 - 1:.1%})",
    )
    assert "NOT within the limits: max_bytes by" in str(report)


def test_the_original_is_chosen_where_it_is_within_the_limits() -> None:
    small, report = _fit(max_bytes="1MB", max_latency_ms=1e6, forms=["int8"])

    assert report.fits
    assert report.result.latency_ms is not None
    assert report.result.score == max(one.score for one in report.candidates)
    assert report.result in report.pareto
    assert isinstance(small, Small)


def _weights_of(path: Path) -> float:
    """As a runtime that multiplies every stored weight, zeros too, and needs a millisecond for 1,000 of them."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [16]
    with TemporaryDirectory() as folder:
        unpack_onnx(path, Path(folder) / "plain.onnx")
        stored = onnx.load(Path(folder) / "plain.onnx").graph.initializer
    return sum(int(np.prod(tensor.dims)) for tensor in stored) / 1000


def test_channels_go_until_a_call_is_fast_enough() -> None:
    small, report = _fit(max_latency_ms=2.5, forms=["packed", "channel"], epochs=1, latency=_weights_of)

    original, packed, channel = report.candidates
    assert original.latency_ms == pytest.approx(5.4, abs=0.2)  # 16 * 64 + 64 * 64 + 64 * 3 weights
    assert packed.latency_ms == original.latency_ms  # a zero takes as long as any other weight
    assert packed.misses == (f"max_latency_ms by {packed.latency_ms - 2.5:.3f} ms ({packed.latency_ms / 2.5 - 1:.1%})",)
    assert report.fits
    assert report.result == channel
    assert 0 < channel.latency_ms <= 2.5
    assert sum(p.numel() for p in small.parameters()) <= 2_600


def test_a_time_that_no_form_reaches_is_named_with_its_excess() -> None:
    _, report = _fit(max_latency_ms=2.0, forms=["int8"], latency=lambda _: 3.0)

    assert not report.fits
    assert report.result.misses == ("max_latency_ms by 1.000 ms (50.0%)",)
    assert "NOT within the limits: max_latency_ms by 1.000 ms" in str(report)


def test_nothing_is_timed_where_no_time_is_asked() -> None:
    def latency(path: Path) -> float:
        raise AssertionError(f"{path} was timed")

    _, report = _fit(max_bytes="1MB", forms=["int8"], latency=latency)
    assert {one.latency_ms for one in report.candidates} == {None}


def test_options_make_the_file_of_the_model(tmp_path: Path) -> None:
    small, report = _fit(max_bytes=9_000, forms=["packed-int8"], path=tmp_path / "a.onnx")

    again = export_onnx(small, tmp_path / "b.onnx", example_inputs=(torch.randn(2, 16),), **report.export_options)

    assert again.bytes == (tmp_path / "a.onnx").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no limit"),
        ({"max_bytes": 10_000, "forms": ["tiny"]}, "expected some of"),
        ({"max_latency_ms": -1.0}, "expected more than 0"),
        ({"max_bytes": 10_000, "epochs": 0}, "expected at least 1"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(Small(), _points(), **options)


@pytest.mark.parametrize(
    "data", [3, [1, 2], TensorDataset(torch.randn(4, 16), torch.zeros(4)), [(torch.randn(2, 16), 1)]]
)
def test_data_that_are_no_samples_are_refused(data: object) -> None:
    with pytest.raises(DataError, match="fit: "):
        fit(Small(), data, max_bytes=10_000)


def test_batches_serve_as_well_as_a_dataset() -> None:
    x, y = _points().tensors
    _, report = fit(Small(), list(zip(x.split(50), y.split(50), strict=True)), max_bytes=30_000, forms=["int8"])
    assert len(report.candidates) == 2


def test_a_scan_finds_the_layer_that_matters_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))  # seven eighths of it are zeros already
    before = copy.deepcopy(model.state_dict())

    layers = scan(model, ["0.weight", "1.weight", "2.weight"], [Batch((torch.randn(64, 8),), None)])

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert layers[0].by_share[0.25] == pytest.approx(0.0, abs=1e-6)
    assert layers[1].by_share[0.25] > 1e-4
    shares = keep_shares(layers, 0.5)
    assert sum(shares[layer.name] * layer.numel for layer in layers) == pytest.approx(0.5 * 152)
    assert shares["0.weight"] < shares["1.weight"]


def test_densities_follow_from_bytes() -> None:
    assert packed_bytes(800, 0.5, 4) == 800 * 2 + 100  # 4 bytes for half of them, a bit for each position
    density = density_within(1000, lambda d: packed_bytes(1000, d, 1))
    assert packed_bytes(1000, density, 1) == pytest.approx(1000, rel=1e-6)
    assert density_within(1e9, lambda d: packed_bytes(10, d, 4)) == 1.0
    assert np.isfinite(density)
