"""Results of layers are written to in place, as an original model may do: `y = layer(x); y += x`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config

IMAGES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(8, 8, 1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "normalised": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "silu": nn.SiLU,
    "dropout": lambda: nn.Dropout(0.3),
    "max pool": lambda: nn.MaxPool2d(3, 1, 1),
    "average pool": lambda: nn.AvgPool2d(3, 1, 1),
    "adaptive pool": lambda: nn.AdaptiveAvgPool2d(6),
    "batch norm": lambda: nn.BatchNorm2d(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "instance norm": lambda: nn.InstanceNorm2d(8),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "layer norm": lambda: nn.LayerNorm(8),
    "gelu": nn.GELU,
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
}
CONFIGS = {
    "codes": Config(activation_bits=8, activation_rounding="nearest"),
    "exact": Config(activation_bits=None, activation_sparsity=0.0, weight_storage="dense"),
    "saved": Config(activation_bits=8, saved_precision="int8", activation_rounding="nearest", normalization="keep"),
}


class _Written(nn.Module):
    """A layer between two others, whose result is written to, or not."""

    def __init__(self, layer: nn.Module, *, is_image: bool, in_place: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1) if is_image else nn.Linear(3, 8)
        self.layer = layer
        self.last = nn.Conv2d(8, 4, 1) if is_image else nn.Linear(8, 4)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        y = self.layer(hidden * 1)
        if self.in_place:
            y += hidden
            y.mul_(0.5)
            y = F.relu_(y)
        else:
            y = F.relu((y + hidden) * 0.5)
        out: Tensor = self.last(y)
        return out


# A ReLU of torch keeps its result: whoever writes to it is told so, as of the original.
CASES = [(config, name) for config in CONFIGS for name in (*IMAGES, *SEQUENCES) if (config, name) != ("exact", "relu")]


@pytest.mark.parametrize(("config", "name"), CASES)
def test_a_result_that_is_written_to_gives_the_same_gradients(name: str, config: str) -> None:
    is_image = name in IMAGES
    x = torch.randn(2, 3, 6, 6) if is_image else torch.randn(2, 5, 3)
    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        network = _Written((IMAGES | SEQUENCES)[name](), is_image=is_image, in_place=in_place)
        model = fedmef_fx.transform(network, CONFIGS[config].replace(density=0.5), example_inputs=(x,))
        torch.manual_seed(1)
        model(x).square().sum().backward()
        results.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, written = results
    assert plain.keys() == written.keys()
    for key, gradient in plain.items():  # what is kept of a tensor, and how, may differ
        assert (written[key] - gradient).norm() <= 0.03 * gradient.norm() + 1e-4
    assert any(gradient.any() for gradient in written.values())


class _Residual(nn.Module):
    """What a ReLU reads is added to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        out: Tensor = self.last(F.relu(hidden) + hidden)
        return out


def test_a_sum_over_the_result_of_a_relu() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = fedmef_fx.transform(_Residual(), Config(density=0.5, activation_bits=8, activation_rounding="nearest"))
    exact = fedmef_fx.transform(_Residual(), Config(density=0.5, activation_bits=None, activation_sparsity=0.0))
    exact.load_state_dict(model.state_dict())
    gradients = []
    for one in (model, exact):
        one(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()
