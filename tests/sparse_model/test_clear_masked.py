"""Masked elements become exactly 0, whatever stands there, in every dtype and layout, with kernels and without."""

import pytest
import torch
from torch import Tensor, nn

from fedmef_fx.native import library
from fedmef_fx.sparse_model import masked_parameter
from fedmef_fx.sparse_model.masked_parameter import clear_masked

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.fixture(params=["kernel", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(masked_parameter, "why_missing", lambda: "a test without kernels")
    return str(request.param)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_masked_elements_become_zero_and_others_stay(dtype: torch.dtype, layout: str, way: str) -> None:
    x, mask = torch.randn(5, 7, 3, 3).to(dtype), torch.rand(5, 7, 3, 3) < 0.4
    x[0, 0, 0] = float("nan")
    x[1, 0, 0] = float("inf")
    mask[:2, 0, 0] = torch.tensor([True, False, False])
    parameter = nn.Parameter(_laid_out(x, layout))
    clear_masked(parameter, mask)
    assert not parameter[~mask].any()
    torch.testing.assert_close(parameter[mask], x[mask], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000])
def test_no_element_beyond_the_tensor_is_touched(numel: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_SMALLEST_PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    around = torch.ones(numel + 2)
    clear_masked(around[1 : numel + 1], torch.zeros(numel, dtype=torch.bool))
    assert around[0] == 1
    assert around[-1] == 1
    assert not around[1:-1].any()


def test_a_backward_that_waits_for_the_weight_goes_on() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    loss = (weight * weight.detach().clone().requires_grad_()).sum()
    clear_masked(weight, torch.eye(4) > 0)
    loss.backward()
    assert weight.grad is not None
