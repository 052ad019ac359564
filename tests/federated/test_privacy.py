"""Differential privacy of clients: clipping, noise on what is active, the accountant."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated import (
    History,
    LocalTraining,
    ModelState,
    NormClipping,
    Privacy,
    RoundRecord,
    Strategy,
    Update,
    run,
)
from fedmef_fx.federated.state import read_state

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.05)
CONFIG = Config(density=0.4, adjustment_interval=1)
MASK = torch.arange(4000).reshape(40, 100) % 2 == 0
SENT = ModelState(
    5,
    {"w": MASK},
    {"w": torch.zeros(2000)},
    {"b": torch.zeros(50), "bn.running_var": torch.zeros(50), "count": torch.tensor(7)},
)


def _update(client: int, size: float) -> Update:
    return Update(
        round_index=5,
        samples=10**client,
        loss=0.1,
        peak_saved_bytes=0,
        values={"w": torch.full((2000,), size)},
        dense={"b": torch.full((50,), size), "bn.running_var": torch.zeros(50), "count": torch.tensor(9)},
        client=client,
    )


def test_clients_are_clipped_and_count_alike() -> None:
    large, small = Privacy(norm=1.0, noise=1.0).clipped([_update(0, 10.0), _update(2, 0.001)], SENT)
    norm = math.hypot(float(large.values["w"].norm()), float(large.dense["b"].norm()))
    assert math.isclose(norm, 1.0, rel_tol=1e-5)
    assert torch.equal(small.values["w"], torch.full((2000,), 0.001))
    assert large.samples == small.samples == 1


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    memory: dict[str, torch.Tensor] = {}
    privacy = Privacy(norm=0.5, noise=2.0)
    averaged = ModelState(6, SENT.masks, SENT.values, {**SENT.dense, "count": torch.tensor(9)})
    noisy = privacy.noisy(averaged, SENT, 4, memory)
    # 2000 draws: the standard error of their deviation is 1.6 %.
    assert math.isclose(float(noisy.values["w"].std()), 2.0 * 0.5 / 4, rel_tol=0.1)
    assert float(noisy.dense["b"].std()) > 0.15
    assert float(noisy.dense["bn.running_var"].min()) == 0.0
    assert int(noisy.dense["count"]) == 7
    # The same in a process that goes on, another in other rounds and runs.
    again = privacy.noisy(averaged, SENT, 4, memory)
    assert torch.equal(again.values["w"], noisy.values["w"])
    later = ModelState(6, SENT.masks, SENT.values, SENT.dense)
    assert not torch.equal(privacy.noisy(averaged, later, 4, memory).values["w"], noisy.values["w"])
    assert not torch.equal(privacy.noisy(averaged, SENT, 4, {}).values["w"], noisy.values["w"])


def _data(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return TensorDataset(torch.randn(samples, 6, generator=generator), labels)


def _play(strategy: Strategy, **options: Any) -> History:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    clients = [_data(20, 0), _data(30, 1), _data(9, 2)]
    arguments: dict[str, Any] = {"rounds": 3, "training": FAST, "method": "static-random", **options}
    return run(net, clients, CONFIG, strategy=strategy, **arguments)


def test_a_private_federation_goes_on_to_the_bit(tmp_path: Path) -> None:
    strategy = Strategy(privacy=Privacy(norm=0.1, noise=0.5, seed=3), clients_per_round=2)
    whole = _play(strategy)
    _play(strategy, rounds=2, checkpoint_dir=tmp_path)
    again = _play(strategy, checkpoint_dir=tmp_path)
    states = [read_state(history.model, version=0) for history in (whole, again) if history.model is not None]
    for name, values in states[0].values.items():
        assert torch.equal(values, states[1].values[name])
        assert bool(values.any())
    with pytest.raises(CheckpointError, match=r"strategy\.privacy: got None"):
        _play(Strategy(clients_per_round=2), rounds=4, checkpoint_dir=tmp_path)


def test_noise_of_nobody_knows_what_seed() -> None:
    first, second = (_play(Strategy(privacy=Privacy(norm=0.1, noise=0.5)), rounds=1) for _ in range(2))
    states = [read_state(history.model, version=0) for history in (first, second) if history.model is not None]
    assert any(not torch.equal(values, states[1].values[name]) for name, values in states[0].values.items())


def test_single_updates_are_kept_from_server_optimizers() -> None:
    class _Looking(Strategy):
        def server_step(self, averaged: ModelState, updates: Any, now: Any) -> ModelState:
            assert list(updates) == []
            return averaged

    assert not _play(_Looking(privacy=Privacy(norm=0.1, noise=0.5)), rounds=1).failures


@pytest.mark.parametrize("method", ["fedmef", "feddst", "snip"])
def test_methods_in_which_clients_choose_masks(method: str) -> None:
    with pytest.raises(ConfigError, match=f"Strategy.privacy: method '{method}' chooses masks"):
        _play(Strategy(privacy=Privacy(norm=1.0, noise=1.0)), method=method)
    history = _play(Strategy(privacy=Privacy(norm=1.0, noise=1.0, protects_masks=False)), method=method, rounds=2)
    assert not history.failures


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Privacy(norm=0.0, noise=1.0), r"Privacy\.norm: got 0\.0"),
        (lambda: Privacy(norm=1.0, noise=math.inf), r"Privacy\.noise: got inf"),
        (lambda: Privacy(norm=1.0, noise=1.0, seed=1.5), r"Privacy\.seed"),  # type: ignore[arg-type]  # wrong on purpose
        (
            lambda: Strategy(privacy=Privacy(norm=1.0, noise=1.0), aggregator=NormClipping(1.0)),
            r"Strategy\.aggregator: got NormClipping.*WeightedMean\(\)",
        ),
        (lambda: Privacy(norm=1.0, noise=1.0).spent(History(), delta=2.0), "delta: got 2"),
        (lambda: Privacy(norm=1.0, noise=1.0).spent(History(), delta=0.1), "history without settings"),
    ],
)
def test_privacy_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def _record(index: int, clients: tuple[int, ...]) -> RoundRecord:
    counts = dict.fromkeys(("bytes_down", "bytes_up", "peak_saved_bytes"), 0)
    return RoundRecord(
        round_index=index, adjusted=False, clients=clients, train_loss=1.0, test_loss=None, test_accuracy=None,
        density=0.5, seconds=0.0, **counts,
    )  # fmt: skip


def test_epsilon() -> None:
    pytest.importorskip("dp_accounting")
    privacy = Privacy(norm=1.0, noise=4.0)
    one = privacy.epsilon(clients=100, asked=100, rounds=1, delta=1e-5)
    # A Gaussian mechanism of multiplier 2, as replacing a client moves the sum by 2 C; by the tight bound it is 2.17.
    assert 2.1 < one < 2.7
    sampled = privacy.epsilon(clients=100, asked=10, rounds=1, delta=1e-5)
    assert 0 < sampled < one
    many = privacy.epsilon(clients=100, asked=10, rounds=50, delta=1e-5)
    assert many > sampled
    assert privacy.epsilon(clients=100, asked=10, rounds=0, delta=1e-5) == 0.0
    settings = {"client_samples": [5] * 100, "clients_per_round": 8, "strategy": {"reserves": 2}}
    history = History([_record(0, (1,)), _record(1, ()), *(_record(t, (1, 2)) for t in range(2, 51))], settings)
    assert math.isclose(privacy.spent(history, delta=1e-5), many)


def test_epsilon_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install fedmef-fx\[privacy\]"):
        Privacy(norm=1.0, noise=1.0).epsilon(clients=9, asked=3, rounds=1, delta=1e-5)
