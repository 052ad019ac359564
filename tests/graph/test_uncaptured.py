"""Calls that no graph serves compute the same without one."""

import torch
from torch import Tensor, nn

from fedmef_fx import Config, transform
from fedmef_fx.graph.dispatch import tables_in
from fedmef_fx.graph.uncaptured import capturing_nothing_more


class Residual(nn.Module):
    """Two NSConvs and their sum; its padding holds for the sizes of one call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.layer, self.layer_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.shortcut_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        missing = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
        x = nn.functional.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = self.norm(self.stem(x)).relu()
        return self.layer_norm(self.layer(x)) + self.shortcut_norm(self.shortcut(x))  # type: ignore[no-any-return]


def test_the_original_forward_computes_what_a_graph_would() -> None:
    model = transform(Residual(), Config(density=0.5), example_inputs=(torch.randn(4, 3, 16, 16),)).eval()
    x = torch.randn(3, 3, 16, 16)
    before = sum(len(table.entries) for _, table in tables_in(model))
    with torch.no_grad(), capturing_nothing_more(model):
        got = model(x)
    assert sum(len(table.entries) for _, table in tables_in(model)) == before
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))
    assert sum(len(table.entries) for _, table in tables_in(model)) > before
