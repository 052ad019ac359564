"""Clients with different amounts of memory: the same masks, their own codes and parts of batches."""

import json
from typing import Any

import pytest
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import ClientData, History, LocalTraining, run

FAST = LocalTraining(epochs=1, batch_size=16, learning_rate=0.02)
CONFIG = Config(density=0.4, adjustment_interval=1)


def _play(network: nn.Module, clients: list[Any], **options: Any) -> History:
    return run(network, clients, CONFIG, training=FAST, **{"rounds": 2, **options})


def test_small_clients_train_in_parts(network: nn.Module, clients: list[TensorDataset]) -> None:
    rich = 10**9
    floor = _floor(network, clients[0])
    data = [ClientData(clients[0], memory_budget=floor), ClientData(clients[1], memory_budget=rich), clients[2]]
    history = _play(network, data)
    assert not history.failures
    plans = history.settings["plans"]
    assert set(plans) == {"0", "1"}
    assert plans["0"]["predicted_peak"] <= floor < plans["1"]["predicted_peak"] < rich
    assert plans["0"]["micro_batch"] is not None
    assert plans["1"]["micro_batch"] is None
    # The rich client keeps everything, the one without a budget what the configuration says.
    assert all(level == [0.0, None] for level in plans["1"]["layers"].values())
    peaks = {client: numbers["peak_saved_bytes"] for client, numbers in history.rounds[1].by_client.items()}
    assert peaks[0] < peaks[2] < peaks[1]
    assert history.rounds[1].adjusted
    json.loads(history.to_json())


def _floor(network: nn.Module, data: TensorDataset) -> int:
    """The smallest budget, nearly: what the planner says that it needs."""
    with pytest.raises(ConfigError, match=r"client 0: ClientData\.memory_budget: .*at least (\d+) bytes") as caught:
        _play(network, [ClientData(data, memory_budget=1000)])
    return int(str(caught.value).partition("at least ")[2].partition(" bytes")[0])


def test_budgets_that_cannot_be(network: nn.Module, clients: list[TensorDataset]) -> None:
    with pytest.raises(ConfigError, match=r"ClientData\.memory_budget"):
        ClientData(clients[0], memory_budget="much")
    with pytest.raises(ConfigError, match="expected the original one"):
        _play(fedmef_fx.transform(network, CONFIG), [ClientData(clients[0], memory_budget=10**9)])
