"""Adaptive gradient clipping: units, masks, and what it is for."""

import math

import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.training.clipping import clip_gradients


def _with(layer: nn.Module, weight: Tensor, gradient: Tensor) -> nn.Module:
    parameter = layer.weight
    assert isinstance(parameter, nn.Parameter)
    parameter.data = weight
    parameter.grad = gradient
    return layer


def test_each_output_channel_is_a_unit() -> None:
    weight = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    gradient = torch.tensor([[0.0, 10.0], [0.3, 0.4], [0.0, 1.0]])
    layer = _with(nn.Linear(2, 3, bias=False), weight, gradient)
    assert clip_gradients(layer, 0.1, eps=1e-2) == 2
    # |W| = 5: at most 0.5. The second row has just that; the third stands for eps = 0.01: at most 0.001.
    expected = torch.tensor([[0.0, 0.5], [0.3, 0.4], [0.0, 0.001]])
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-6, atol=0)  # rounding of one division


def test_a_transposed_convolution_has_its_output_channels_second() -> None:
    layer = nn.ConvTranspose1d(2, 1, 1, bias=False)
    _with(layer, torch.tensor([[[3.0]], [[4.0]]]), torch.tensor([[[6.0]], [[8.0]]]))
    assert clip_gradients(layer, 0.2) == 1
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[[0.6]], [[0.8]]]))


def test_a_vector_is_one_unit() -> None:
    layer = _with(nn.BatchNorm1d(2), torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0]))
    assert clip_gradients(layer, 0.1) == 1
    torch.testing.assert_close(layer.weight.grad, torch.tensor([0.3, 0.4]))


def test_only_active_weights_count() -> None:
    sparse = fedmef_fx.transform(
        nn.Sequential(nn.Linear(4, 2, bias=False)), Config(density=0.5, weight_storage="dense")
    )
    weight, mask = sparse.get_parameter("0.weight"), fedmef_fx.masks(sparse)["0.weight"]
    weight.grad = torch.ones_like(weight)  # as somebody's own loss term may leave it, without the mask
    clip_gradients(sparse, 0.1)
    assert torch.equal(weight.grad[~mask], torch.zeros(int((~mask).sum())))
    for row, active in zip(range(2), mask, strict=True):
        norm = weight.detach()[row][active].norm()
        if active.any():
            torch.testing.assert_close(weight.grad[row].norm(), 0.1 * norm)


def test_small_gradients_stay_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.grad = 1e-4 * torch.randn_like(layer.weight)
    before = layer.weight.grad.clone()
    assert clip_gradients(layer, 0.1) == 0
    assert torch.equal(layer.weight.grad, before)


def test_ignored_modules_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    clip_gradients(model, 0.01, ignore=["1"])
    assert bool((model[0].weight.grad < 1).all())
    assert bool((model[1].weight.grad == 100).all())


def test_shared_parameters_are_clipped_once() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    first.weight.grad = torch.ones(2, 2)
    assert clip_gradients(nn.Sequential(first, second), 1e-3) == 2


def test_parameters_without_a_gradient_and_scalars() -> None:
    model = nn.ParameterList([nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(3))])
    model[0].grad = torch.tensor(8.0)
    assert clip_gradients(model, 0.5) == 1
    assert float(model[0].grad) == 1.0
    assert clip_gradients(nn.Linear(1, 1), 0.5) == 0


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_bad_ratio(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"ratio.*expected a number > 0, e\.g\. 0\.01"):
        clip_gradients(nn.Linear(1, 1), ratio)


def test_bad_eps() -> None:
    with pytest.raises(ConfigError, match="eps"):
        clip_gradients(nn.Linear(1, 1), 0.1, eps=-1.0)
