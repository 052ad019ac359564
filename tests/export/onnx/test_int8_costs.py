"""When int8 costs too much: outputs that move, and classes that change although outputs hardly move."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedmef_fx import export_onnx
from fedmef_fx.export.onnx.int8_costs import LARGEST_CHANGE, LARGEST_ERROR, Cost, changed_choices


def _scores(rows: int, *, lead: float, classes: int = 4) -> np.ndarray:
    scores = np.zeros((rows, classes))
    scores[np.arange(rows), np.arange(rows) % classes] = lead
    return scores


def test_a_share_is_that_of_the_normal_distribution() -> None:
    # Leads of 1 that change by +-0.5: spread 0.5, and Phi(-2) = 0.02275.
    before = _scores(100, lead=1.0)
    after = before + 0.5 * np.sign(before) * np.where(np.arange(100) % 2, 1, -1)[:, None]
    assert changed_choices([before], [after]) == pytest.approx(0.0227501, abs=1e-6)
    halves = [before[:50], before[50:]], [after[:50], after[50:]]
    assert changed_choices(*halves) == changed_choices([before], [after])


def test_a_share_is_at_least_what_is_counted() -> None:
    before = _scores(100, lead=1.0)
    after = before.copy()
    after[:7, :2] = [0.0, 9.0]
    after[1], after[5] = before[1], before[5]  # of class 1 already
    assert changed_choices([before], [after]) >= 0.05
    assert changed_choices([before], [before]) == 0.0


@pytest.mark.parametrize("shape", [(100, 1), (100, 3, 4), (49, 10)], ids=["one score", "no scores", "few rows"])
def test_other_outputs_have_no_classes(shape: tuple[int, ...]) -> None:
    before = np.random.default_rng(0).standard_normal(shape)
    assert changed_choices([before], [-before]) == 0.0


def test_both_limits_count() -> None:
    assert Cost(LARGEST_ERROR, LARGEST_CHANGE).is_allowed
    assert not Cost(1.01 * LARGEST_ERROR, 0.0).is_allowed
    assert not Cost(0.0, 1.01 * LARGEST_CHANGE).is_allowed
    assert str(Cost(0.031, 0.042)) == "outputs by 3.1% of their spread and the class of 4.2% of rows"
    assert str(Cost(0.031, 0.0)) == "outputs by 3.1% of their spread"


class _Close(nn.Module):
    """Two classes of four lead by little, so that an error that is small for the outputs' spread changes which wins."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.head.weight *= 0.05
            self.head.bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0]))
            self.first.weight[3] *= 30
            self.second.weight[:, 3] /= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu())  # type: ignore[no-any-return]


def test_a_layer_that_changes_classes_stays_float32(tmp_path: Path) -> None:
    data = [torch.randn(100, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    report = export_onnx(
        _Close().eval(), tmp_path / "m.onnx", example_inputs=(data[0],), quantize="int8", calibration_data=data
    )
    assert {layer.name: layer.kind for layer in report.layers}["second"] == "float32"
    notice = next(notice for notice in report.notices if "float32 stays in" in notice)
    assert "% of rows: float32 stays in second (" in notice

    few = export_onnx(
        _Close().eval(), tmp_path / "m.onnx", example_inputs=(data[0],), quantize="int8", calibration_data=[data[0][:8]]
    )
    assert {layer.kind for layer in few.layers} == {"int8"}
