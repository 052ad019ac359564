"""Subclasses of BatchNorm in a graph that is captured later: they scale and shift there as everywhere else."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, freeze, transform


class NormAct(nn.BatchNorm2d):
    """With the activation inside, as timm's; what Python code computes is not what BatchNorm's forward does."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__(channels, eps=eps)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(x)


class Patches(nn.Module):
    """Takes the size of the batch for a number, so that another batch is another kind of call."""

    def __init__(self, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), NormAct(8, eps=eps)
        self.second, self.last = nn.Conv2d(8, 8, 3, bias=False), NormAct(8, eps=eps)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.second(self.norm(self.first(x))))
        batch, channels, height, width = (int(size) for size in x.shape)
        return self.head(x.reshape(batch, channels, height * width).mean(2))


@pytest.mark.parametrize("eps", [1e-5, 1e-4])
def test_a_later_graph_has_no_batch_norm(eps: float) -> None:
    sparse = transform(Patches(eps=eps), Config(density=0.5), example_inputs=(torch.randn(2, 3, 12, 12),)).eval()
    frozen = freeze(sparse)
    for batch in (3, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        expected = frozen(x)
        # A division by sqrt(1 + eps) in each of two layers would be eps; rounding is a few 1e-7.
        assert (sparse(x) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_running_statistics_are_not_read() -> None:
    model = Patches()
    for norm in (model.norm, model.last):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    sparse = transform(model, Config(density=0.5), example_inputs=(torch.randn(2, 3, 12, 12),)).eval()
    x = torch.randn(3, 3, 12, 12)
    before = sparse(x)
    for name in ("norm", "last"):
        getattr(sparse, name).running_mean.fill_(7.0)
    assert torch.equal(sparse(x), before)
