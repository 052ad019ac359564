"""What comparing a file with its model does to the model."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.graph.dispatch import tables_in


class PadsBySize(nn.Module):
    """Computes its padding in Python, so that a graph holds for the sizes of one call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        missing = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
        x = nn.functional.pad(x, (missing // 2, missing - missing // 2) * 2)
        y = self.second(self.first(x).relu()).relu()
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_other_batch_sizes_leave_no_graphs_in_the_model(tmp_path: Path, weights: Literal["dense", "packed"]) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = transform(PadsBySize(), Config(density=0.5), example_inputs=(x,)).eval()
    model(x)
    tables = [(table, len(table.entries), table.attempts) for _, table in tables_in(model)]

    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(x,), weights=weights)

    assert report.parity is not None
    assert report.parity.batch_sizes == (2, 1, 2, 3)
    assert [(table, len(table.entries), table.attempts) for _, table in tables_in(model)] == tables


def test_sizes_of_another_kind_are_captured_afterwards(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = transform(PadsBySize(), Config(density=0.5), example_inputs=(x,)).eval()
    export_onnx(model, tmp_path / "m.onnx", example_inputs=(x,))
    before = sum(len(table.entries) for _, table in tables_in(model))
    model(torch.randn(2, 3, 17, 17))
    assert sum(len(table.entries) for _, table in tables_in(model)) > before
