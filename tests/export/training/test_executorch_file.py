"""Wrong calls of `export_executorch` end before any work, with or without ExecuTorch."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedmef_fx import Config, FedmefError, export_executorch, transform
from fedmef_fx.export.training.report import DeviceCheck, TrainingExportReport

X, Y = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("model", "changed", "message"),
    [
        (network(), {}, "is not transformed"),
        (transform(network().double()), {"example_inputs": (X.double(),)}, "float64"),
        (transform(network()), {"example_inputs": X}, "expected a tuple"),
        (transform(network()), {"example_target": Y[:3]}, r"got example_target \[3\]; expected a tensor of 4"),
        (transform(network()), {"example_target": 1}, "got example_target int"),
        (transform(network()), {"check_steps": -1}, "check_steps=-1"),
        (transform(network()), {"learning_rate": 0.0}, "learning_rate=0.0"),
        (transform(network()), {"path": "nowhere/model.pte"}, "no directory"),
    ],
)
def test_wrong_calls(model: nn.Module, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"path": tmp_path / "m.pte", "example_inputs": (X,), "example_target": Y, **changed}
    with pytest.raises(FedmefError, match=message):
        export_executorch(model, given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


def test_without_executorch_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "executorch":
            raise ImportError(name)
        return usual(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FedmefError, match=r"pip install 'fedmef-fx\[executorch\]'"):
        export_executorch(
            transform(network(), Config(density=0.5)), tmp_path / "m.pte", example_inputs=(X,), example_target=Y
        )
    assert not list(tmp_path.iterdir())


def test_a_report_reads_as_a_few_lines() -> None:
    report = TrainingExportReport(
        path=Path("m.pte"),
        bytes=2000,
        planned_bytes=3000,
        parameters=4,
        batch_size=8,
        check=DeviceCheck(steps=20, loss=1e-7, gradients=2e-6, worst_gradients=3e-6, masked=0.0),
        notices=("drops nothing: 2",),
    )
    assert str(report).splitlines() == [
        "m.pte: 2.0 kB, plans 3.0 kB for steps of 8 samples, 4 parameters",
        "20 steps in the runtime: losses differ by 1.0e-07, gradients by 2.0e-06 (at most 3.0e-06), "
        "masked weights by 0 from 0",
        "notice: drops nothing: 2",
    ]
