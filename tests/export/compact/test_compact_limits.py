"""What compaction must leave alone, with its reason, and what it reports."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import compact, compact_report
from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.models import digits_cnn
from tests.export.compact.compact_models import Residual, check, kill, lively


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm([8, 4, 4])])
def test_norms_over_channels_keep_them(norm: nn.Module) -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)))
    kill(model[0])
    result = check(model, (3, 6, 6), {"0.weight": (8, 3, 3, 3)})
    assert "statistics over all channels" in compact_report(result).refusals[0][1]


class Unknown(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.operation = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(F.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: x.flip(1), "flip"),
        (lambda x: x.softmax(1), "normalises over it"),
        (lambda x: x - x.mean(1, keepdim=True), "takes the mean over it"),
        (lambda x: F.normalize(x, dim=1), "normalize"),
        (lambda x: torch.roll(x, 1, 1), "roll"),
        (lambda x: torch.cat([x[:, 4:], x[:, :4]], 1), "takes a part of it by its place"),
    ],
)
def test_what_is_not_understood_keeps_its_channels(operation: Callable[[Tensor], Tensor], reason: str) -> None:
    model = lively(Unknown(operation))
    kill(model.conv)
    result = check(model, (3, 4, 4), {"conv.weight": (8, 3, 1, 1)})
    assert reason in compact_report(result).refusals[0][1]


class WritesInPlace(nn.Module):
    """What a channel holds changes after it was zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        view = hidden.view(hidden.shape)
        view.add_(1.0)
        return self.head(hidden)


def test_values_that_are_overwritten_are_not_known() -> None:
    model = lively(WritesInPlace())
    kill(model.conv)
    check(model, (3, 4, 4), {"conv.weight": (8, 3, 1, 1)})


def test_outputs_stay_and_so_does_one_channel_of_what_is_dead_altogether() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)))
    kill(model[0], channels=list(range(8)))
    kill(model[2])
    check(model, (4,), {"0.weight": (1, 4), "2.weight": (8, 1)})


def test_tied_weights_lose_what_both_uses_lack() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    model = lively(Tied())
    kill(model.first)
    result = check(model, (6,), {"first.weight": (6, 6)})  # its columns read inputs of the model
    assert result.get_parameter("first.weight") is result.get_parameter("second.weight")


def test_a_transformed_model_is_frozen_first() -> None:
    model = fedmef_fx.transform(digits_cnn(), fedmef_fx.Config())
    x = torch.randn(2, 1, 8, 8)
    result = compact(model, (x,))
    assert not any("fedmef" in str(type(module)) for module in result.modules())
    torch.testing.assert_close(result(x), model.eval()(x), rtol=1e-4, atol=1e-5)  # float32, folded in another order


def test_a_model_that_is_no_graph_comes_back_whole_with_the_reason() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            while float(x.sum()) < 3:
                x = self.layer(x).abs() + 1
            return x

    model = Loop().eval()
    result = compact(model, (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    assert torch.equal(result(x), model(x))
    assert result is not model
    assert "cannot be traced as one graph" in compact_report(result).refusals[0][1]


def test_the_report_counts_and_becomes_json() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    kill(model[0], channels=[0, 1, 2, 3])
    report = compact_report(compact(model, (torch.randn(2, 4).double(),)))
    assert (report.parameters_before, report.parameters_after) == (4 * 8 + 8 + 8 * 2 + 2, 4 * 4 + 4 + 4 * 2 + 2)
    assert (report.flops_before, report.flops_after) == (2 * 2 * (4 * 8 + 8 * 2), 2 * 2 * (4 * 4 + 4 * 2))
    assert type(report).of_dict(json.loads(json.dumps(report.as_dict()))) == report
    assert "2.00 times fewer" in str(report)


def test_what_cannot_be_used_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="compact: example_inputs is a Tensor"):
        compact(model, torch.randn(2, 4))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="was not made by compact"):
        compact_report(model)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.randn_like(x)

    with pytest.raises(ExportError, match="draws random numbers"):
        compact(Noise(), (torch.randn(2, 4),))


def test_a_compacted_model_can_be_copied_and_compacted_again() -> None:
    model = lively(Residual())
    kill(model.stem, model.conv2)
    x = torch.randn(2, 3, 6, 6).double()
    once = compact(model, (x,))
    twice = compact(copy.deepcopy(once), (x,))
    assert torch.equal(once(x), twice(x))
    assert compact_report(twice).parameters_after == compact_report(once).parameters_after
