"""Bitmaps by Triton, on a GPU or in its interpreter: what numpy makes."""

import math

import pytest
import torch

from fedmef_fx.packing import backend, backends, triton_choice
from fedmef_fx.packing.backend_torch import TorchBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [0, 1, 7, 8, 1023, 1024, 2051]


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from fedmef_fx.packing.triton_bits import TritonBackend  # noqa: PLC0415  # imports Triton

    return TritonBackend()


def sample(size, dtype):
    x = torch.randn(size) * 4
    x[: size // 3 : 5] = 0.0
    for at, value in enumerate((math.nan, math.inf, -math.inf, -0.0, 6.0)):
        x[at * 3 + 1 : at * 3 + 2] = value
    return x.to(dtype)


def assert_same(got, expected):
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, 0.1), (-1.0, 1.0)])
def test_clamp(kernels, low, high, dtype):
    for size in SIZES:
        x = sample(size, dtype)
        expected_out, out = torch.empty_like(x), torch.empty_like(x, device=DEVICE)
        expected = backend("numpy").clamp_bits(x, out=expected_out, low=low, high=high)
        assert_same(kernels.clamp_bits(x.to(DEVICE), out=out, low=low, high=high), expected)
        assert_same(out, expected_out)
        in_place = x.to(DEVICE)
        kernels.clamp_bits(in_place, out=in_place, low=low, high=high)
        assert_same(in_place, expected_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_off", [0.0, 0.1, -10.0])
def test_mask(kernels, scale_off, dtype):
    for size in SIZES:
        grad, bits = sample(size, dtype), torch.randint(256, ((size + 7) // 8,), dtype=torch.uint8)
        expected, out = torch.empty_like(grad), torch.empty_like(grad, device=DEVICE)
        TorchBackend().mask_by_bits(bits, grad, out=expected, scale_off=scale_off)
        kernels.mask_by_bits(bits.to(DEVICE), grad.to(DEVICE), out=out, scale_off=scale_off)
        assert_same(out, expected)


def test_gpus_get_these_kernels_where_triton_is_there(monkeypatch):
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda")})()
    monkeypatch.setenv(triton_choice.TRITON_VARIABLE, "0")
    assert backends._kernels_for(on_gpu).name == "torch"
    monkeypatch.setenv(triton_choice.TRITON_VARIABLE, "1")
    pytest.importorskip("triton")
    assert backends._kernels_for(on_gpu).name == "triton"
