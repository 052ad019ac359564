"""Attention over any number of leading dimensions becomes one of four."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.export.onnx.attention import FourDimensionalAttention


@pytest.mark.parametrize("mask", [None, (5, 5), (3, 1, 5, 5), (2, 3, 4, 5, 5)], ids=str)
@pytest.mark.parametrize("lead", [(), (4,), (3, 4), (2, 3, 4), (6, 2, 3, 4)], ids=str)
def test_values_are_those_of_the_same_attention(lead: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
    if mask is not None and (len(mask) - 2 > len(lead) or not lead):
        pytest.skip("no such attention")
    q, k, v = (torch.randn(*lead, 5, 8) for _ in range(3))
    bias = None if mask is None else torch.randn(mask)
    expected = F.scaled_dot_product_attention(q, k, v, bias, is_causal=mask is None)
    with FourDimensionalAttention():
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=mask is None)
    assert result.shape == expected.shape
    # Other kernels of the same sums.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


class Windows(nn.Module):
    """Attention inside windows of an image, as Twins has it: [batch, windows, heads, length, width]."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.qkv, self.head, self.dims = nn.Linear(16, 48), nn.Linear(16, 4), dims

    def forward(self, x: Tensor) -> Tensor:
        number = x.shape[0]
        windows = x.reshape(number, 2, 4, 2, 4, 16).transpose(2, 3).reshape(number, 4, 16, 16)
        q, k, v = self.qkv(windows).reshape(number, 4, 16, 3, 2, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        if self.dims == 3:
            q, k, v = (part.flatten(0, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(y.reshape(number, -1, 16).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dims", [3, 5])
def test_windows_of_images_export(tmp_path: Path, dims: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 16)
    model = transform(Windows(dims), Config(density=0.4), example_inputs=(x,)).eval()
    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(x,), weights="packed")
    assert report.parity is not None
    assert set(report.parity.batch_sizes) == {1, 2, 3}
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(5, 8, 8, 16)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).detach(), rtol=1e-5, atol=1e-6)
