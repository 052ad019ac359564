"""Sparse models train in ExecuTorch's runtime as in torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx.errors import ExportError
from fedmef_fx.export.training.joint_graph import ExportedStep
from fedmef_fx.models import digits_cnn

pytest.importorskip("executorch", reason="needs executorch")
# What its packages warn of while they are imported is no concern of this one.
pytestmark = pytest.mark.filterwarnings("ignore")

X, Y = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 1, 7, 0])


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_twenty_steps_on_the_device(storage: Any, tmp_path: Path) -> None:
    model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.2, weight_storage=storage))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fedmef_fx.export_executorch(
        model, tmp_path / "digits.pte", example_inputs=(X,), example_target=Y, learning_rate=0.01
    )
    assert report.check is not None
    assert (report.check.steps, report.check.masked) == (20, 0)
    assert report.check.loss < 1e-5
    assert report.check.gradients < 1e-4
    assert report.bytes == (tmp_path / "digits.pte").stat().st_size
    assert report.planned_bytes > X.nbytes
    assert report.batch_size == 4
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_packed_weights_make_the_file_small(tmp_path: Path) -> None:
    sizes = []
    for storage in ("dense", "packed"):
        model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config(density=0.1, weight_storage=storage))
        path = tmp_path / f"{storage}.pte"
        report = fedmef_fx.export_executorch(model, path, example_inputs=(X,), example_target=Y, check_steps=0)
        assert report.check is None
        sizes.append(report.bytes)
    assert sizes[1] < 0.5 * sizes[0]


class Overlapping(nn.Module):
    """A pooling whose windows share elements, which ExecuTorch's own kernel adds to what lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.max_pool2d(F.relu(self.first(x)), 3, 2, 1)).mean((2, 3))


def test_poolings_train(tmp_path: Path) -> None:
    model = fedmef_fx.transform(Overlapping(), fedmef_fx.Config(density=0.5))
    report = fedmef_fx.export_executorch(
        model, tmp_path / "m.pte", example_inputs=(X,), example_target=Y % 4, check_steps=5
    )
    assert report.check is not None
    assert report.check.worst_gradients < 1e-3


class Attention(nn.Module):
    """Attention between the rows of an image, as torch fuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x[:, 0]).mean(1))


def test_attention_trains(tmp_path: Path) -> None:
    model = fedmef_fx.transform(Attention(), fedmef_fx.Config(density=0.5))
    report = fedmef_fx.export_executorch(
        model, tmp_path / "m.pte", example_inputs=(X,), example_target=Y, check_steps=5
    )
    assert report.check is not None
    assert report.check.worst_gradients < 1e-3
    assert report.notices == ("drops nothing: layer.dropout, layer.dropout1, layer.dropout2",)


def test_a_file_that_trains_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, exact = tmp_path / "m.pte", ExportedStep.differentiated
    path.write_bytes(b"before")

    def wrong(*arguments: Any) -> Any:
        loss, gradients = exact(*arguments)
        return loss, {name: 2 * gradient for name, gradient in gradients.items()}

    monkeypatch.setattr(ExportedStep, "differentiated", wrong)
    model = fedmef_fx.transform(digits_cnn())
    with pytest.raises(ExportError, match="trains differently from torch"):
        fedmef_fx.export_executorch(model, path, example_inputs=(X,), example_target=Y, check_steps=2)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
