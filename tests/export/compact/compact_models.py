"""Models with dead channels, and what compaction must have done to them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import compact

DEAD = [1, 2, 5]


@torch.no_grad()
def kill(*layers: nn.Module, channels: list[int] = DEAD, bias: float = 0.0) -> None:
    """Make output channels of layers, or of norms, constant."""
    for layer in layers:
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        weight = layer.weight.transpose(0, 1) if transposed else layer.weight
        weight[channels] = 0.0
        if layer.bias is not None:
            layer.bias[channels] = bias


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """In eval mode and float64, with statistics that are not those of a new BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 2.0)
            module.bias.normal_()
    return model.double().eval()


def check(model: nn.Module, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]]) -> nn.Module:
    """Compact, compare on inputs that were not shown and of another batch size, and compare the shapes."""
    before = copy.deepcopy(model.state_dict())
    result = compact(model, (torch.randn(2, *shape).double(),))
    for batch in (1, 5):
        x = torch.randn(batch, *shape).double()
        torch.testing.assert_close(result(x), model(x), rtol=1e-10, atol=1e-10)
    assert {name: tuple(result.get_parameter(name).shape) for name in expected} == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(result.state_dict()) <= set(before) | {name.replace("weight", "bias") for name in before}
    return result


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = F.relu(self.conv1(x), inplace=True)
        out = self.conv2(out)
        out += x
        return self.head(F.relu(out)).mean((2, 3))
