"""Convolutions of batches so large that they are worked out a few samples at a time."""

import pytest
import torch
from torch import nn

from fedmef_fx import Config, transform


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 24, 1, stride=2, bias=False),  # whose input is larger than its result
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_sample_has_its_result(layer: nn.Module, layout: torch.memory_format) -> None:
    model = transform(nn.Sequential(layer), Config(density=1.0, normalization="keep", activation_sparsity=0.0))
    x = torch.randn(33, 16, 64, 64).contiguous(memory_format=layout)  # 2.2 million, not in parts of one size
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = model(x), layer(y)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    found.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(x.grad, y.grad)
