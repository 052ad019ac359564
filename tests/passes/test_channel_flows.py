"""Channel masks stand only where channels can leave, and the report says what will be left."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from fedmef_fx import Config, compact, compact_report, coverage, masks, report, transform
from fedmef_fx.models import mobilenet_v2
from tests.models import Residual

CHANNELS = Config(granularity="channel", density=0.5, allocation="uniform", channel_multiple=2)


class Block(nn.Module):
    """A block of ConvNeXt: the stream is normalised over channels, which lie last in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(nn.functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), Block(8), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def predicted(model: nn.Module) -> tuple[int, int]:
    (notice,) = [notice for result in report(model) for notice in result.notices if "compact leaves" in notice]
    after, before = re.findall(r"[\d,]+(?= or| weights)", notice)
    return int(before.replace(",", "")), int(after.replace(",", ""))


def test_a_stream_under_layer_norm_stays_dense_with_its_reason() -> None:
    model = transform(convnext(), CHANNELS)

    assert set(masks(model)) == {"1.wide.weight", "2.wide.weight"}
    reasons = {row.name: row.reason for row in coverage(model).rows}
    for name in ("0.weight", "1.narrow.weight", "2.narrow.weight"):
        assert "layer_norm takes statistics over all of its channels" in reasons[name]
    layers = {layer.name: layer for layer in compact_report(compact(model, (torch.randn(2, 3, 8, 8),))).layers}
    for name in masks(model):
        assert layers[name].after[0] == layers[name].before[0] / 2


def test_group_norm_keeps_its_layer_and_no_other() -> None:
    assert set(masks(transform(grouped(), CHANNELS))) == {"3.weight", "5.weight"}


def test_an_operation_that_is_not_known_keeps_its_layer() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(torch.cumsum(self.first(x), 1)).relu())

    model = transform(Sorted(), CHANNELS)

    assert set(masks(model)) == {"second.weight"}
    assert "cumsum reads all of its channels" in str(report(model))


@pytest.mark.parametrize(
    ("make", "size"),
    [(convnext, 8), (grouped, 8), (Residual, 8), (lambda: mobilenet_v2(num_classes=4), 32)],
    ids=["convnext", "grouped", "residual", "mobilenet"],
)
def test_the_report_says_what_compact_leaves(make: type[nn.Module], size: int) -> None:
    model = transform(make(), CHANNELS)

    layers = compact_report(compact(model, (torch.randn(2, 3, size, size),))).layers

    before = sum(math.prod(layer.before) for layer in layers)
    after = sum(math.prod(layer.after) for layer in layers)
    assert predicted(model) == (before, after)
    assert predicted(model)[1] < predicted(model)[0]


def test_other_masks_promise_nothing_of_compact() -> None:
    assert "compact" not in str(report(transform(convnext(), Config(density=0.5))))
