"""Conveniences of `run`: a line per round, training as a dictionary, the logger."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import LocalTraining, run

CLIENTS = [TensorDataset(torch.linspace(-1, 1, 64).reshape(8, 8), torch.arange(8) % 2) for _ in range(2)]


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def test_true_prints_a_line_per_round(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedmef_fx"):
        run(_net(), CLIENTS, Config(density=0.5), rounds=2, test=CLIENTS[0], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["round 1 of 2", "round 2 of 2"]
    assert "test accuracy" in err
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith("round ")] == err.splitlines()


def test_false_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run(_net(), CLIENTS, Config(density=0.5), rounds=1, progress=False)
    assert capsys.readouterr() == ("", "")


def test_training_may_be_a_dictionary() -> None:
    histories = [
        run(_net_of_seed(), CLIENTS, Config(density=0.5), rounds=1, training=training)
        for training in ({"epochs": 3, "optimizer": "adam"}, LocalTraining(epochs=3, optimizer="adam"))
    ]
    assert histories[0].settings == histories[1].settings
    assert histories[0].rounds[0].train_loss == histories[1].rounds[0].train_loss


def _net_of_seed() -> nn.Module:
    torch.manual_seed(0)
    return _net()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": {"epoch": 1}}, "got 'epoch'; expected some of epochs, batch_size"),
        ({"training": {"epochs": 0}}, "epochs: got 0"),
        ({"training": 3}, "got int; expected a LocalTraining"),
        ({"progress": "yes"}, "progress: got str; expected True, or a function"),
    ],
)
def test_other_kinds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(_net(), CLIENTS, Config(density=0.5), rounds=1, **options)
