"""Small models and data that train in milliseconds."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config


def small_network() -> nn.Sequential:
    """Every kind of tensor that is exchanged: masked weights, gains, biases, float and integer buffers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(1, 6, 3, padding=1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(6)
    layers["relu1"] = nn.ReLU()
    layers["conv2"] = nn.Conv2d(6, 8, 3, padding=1, stride=2, bias=False)
    layers["bn2"] = nn.BatchNorm2d(8)
    layers["relu2"] = nn.ReLU()
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(8 * 2 * 2, 3)
    return nn.Sequential(layers)


def blobs(samples: int, *, seed: int) -> TensorDataset:
    """Images of 4x4 pixels in three classes that are easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    images = 0.3 * torch.randn(samples, 1, 4, 4, generator=generator)
    images[torch.arange(samples), 0, labels] += 1.5
    return TensorDataset(images, labels)


@pytest.fixture
def network() -> nn.Sequential:
    return small_network()


@pytest.fixture
def sparse() -> Callable[..., nn.Module]:
    """Makes transformed small networks, always with the same weights."""

    def make(**options: object) -> nn.Module:
        torch.manual_seed(0)
        return fedmef_fx.transform(small_network(), Config(**{"density": 0.3, "weight_storage": "dense", **options}))  # type: ignore[arg-type]

    return make


@pytest.fixture
def clients() -> list[TensorDataset]:
    return [blobs(size, seed=seed) for seed, size in enumerate([24, 9, 17])]


@pytest.fixture
def test_set() -> TensorDataset:
    return blobs(60, seed=99)
