"""Models that write in place to what a dropout returns: in eval mode that is its input itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.export.onnx.dropout import IdleDropoutIsInput


class DropPath(nn.Module):
    """Drops samples in training, as residual networks do; in eval mode its input itself comes back."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) > 0.5)


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WritesInPlace(nn.Module):
    """Adds to what a module returns, and reads what the module was given afterwards."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first, self.module, self.second = nn.Conv2d(3, 6, 3), module, nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = self.module(h)
        y += 1
        return (self.second(h).relu() + y).mean((2, 3))  # type: ignore[no-any-return]


IDLE = {
    "Dropout": nn.Dropout(0.3),
    "Dropout in place": nn.Dropout(0.3, inplace=True),
    "Dropout twice": nn.Sequential(nn.Dropout(0.3), nn.Identity(), nn.Dropout(0.1)),
    "Dropout1d": Called(lambda x: F.dropout1d(x.flatten(2), 0.3, training=False).view_as(x)),
    "Dropout2d": nn.Dropout2d(0.3),
    "AlphaDropout": nn.AlphaDropout(0.3),
    "FeatureAlphaDropout": nn.FeatureAlphaDropout(0.3),
    "Identity": nn.Identity(),
    "DropPath": DropPath(),
    "F.dropout": Called(lambda x: F.dropout(x, 0.3, training=False)),
    "F.dropout of nothing": Called(lambda x: F.dropout(x, p=0.0)),
    "F.dropout2d": Called(lambda x: F.dropout2d(x, 0.3, training=False)),
    "F.alpha_dropout": Called(lambda x: F.alpha_dropout(x, 0.3)),
    "torch.dropout": Called(lambda x: torch.dropout(x, 0.3, train=False)),
    "aten.dropout": Called(lambda x: torch.ops.aten.dropout(x, 0.3, False)),
}


@pytest.mark.parametrize("is_sparse", [False, True], ids=["plain", "sparse"])
@pytest.mark.parametrize("name", IDLE)
def test_writing_to_what_dropout_returns(tmp_path: Path, name: str, is_sparse: bool) -> None:
    x = torch.randn(2, 3, 8, 8)
    model: nn.Module = WritesInPlace(IDLE[name]).eval()
    if is_sparse:
        model = transform(model, Config(density=0.5), example_inputs=(x,)).eval()

    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(x,))

    assert report.notices == ()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def test_dropout_that_drops_stays() -> None:
    x = torch.ones(100)
    with IdleDropoutIsInput():
        assert F.dropout(x, 0.5, training=False) is x
        for dropped in (F.dropout(x), F.dropout(x, 1.0), torch.dropout(x, 0.9, train=True)):
            assert (dropped == 0).any()
        with pytest.raises(ValueError, match="probability"):
            F.dropout(x, 2.0, training=False)
