"""Clients in processes: the same bits as in this one, and a process that dies or hangs costs its client alone."""

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import ConfigError, RoundError
from fedmef_fx.federated import History, LocalRound, LocalTraining, RoundRecord, Strategy, run

CONFIG = Config(density=0.3, adjustment_interval=2)
TRAINING = LocalTraining(batch_size=8, learning_rate=0.02)

Start = Callable[..., History]


class _Rows(Dataset[Any]):
    """The rows of another data set, after something has happened in the process that reads them."""

    def __init__(self, rows: TensorDataset, happens: Callable[[], None]) -> None:
        self._rows, self._happens = rows, happens

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        self._happens()
        return self._rows[index]


class _OddError(Exception):
    """One that cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class _Momentum(Strategy):
    """Clients that keep the weights they ended with, and start from them in part."""

    def before_step(self, local: LocalRound) -> None:
        local.add_to_gradients({name: 0.1 * tensor for name, tensor in local.recall("last").items()})

    def after_training(self, local: LocalRound) -> None:
        local.remember("last", local.weights())


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies_once(path: Path) -> None:
    if not path.exists():
        path.touch()
        _dies()


def _raises() -> None:
    raise _OddError("cannot read /home/somebody/rows.bin", "")


def _hangs() -> None:
    time.sleep(600)


def _halved(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) / 2


@pytest.fixture
def start(network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset) -> Start:
    def call(**changes: Any) -> History:
        options: dict[str, Any] = {"rounds": 4, "training": TRAINING, "test": test_set, **changes}
        return run(network, options.pop("clients", clients), options.pop("config", CONFIG), **options)

    return call


def _fields(record: RoundRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__ if name != "seconds"}


def _assert_same(found: History, expected: History) -> None:
    assert found.model is not None
    assert expected.model is not None
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert [_fields(record) for record in found.rounds] == [_fields(record) for record in expected.rounds]
    assert found.failures == expected.failures


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients_per_round": 2, "rounds": 6, "loss_fn": _halved},  # processes that were not there in every round
        {"method": "snip"},
        {"strategy": _Momentum(clients_per_round=2)},
        {"method": "feddst", "clients_per_round": 2},
    ],
)
def test_the_same_bits_as_one_after_the_other(start: Start, changes: dict[str, Any]) -> None:
    _assert_same(start(parallel=2, **changes), start(**changes))


def test_more_processes_than_clients(start: Start) -> None:
    _assert_same(start(parallel=7, rounds=1), start(rounds=1))


def test_a_run_goes_on_in_processes(start: Start, tmp_path: Path) -> None:
    expected = start()
    start(rounds=2, config=CONFIG.replace(adjustment_stop=4), checkpoint_dir=tmp_path)
    found = start(config=CONFIG.replace(adjustment_stop=4), checkpoint_dir=tmp_path, parallel=2)
    assert found.model is not None
    assert expected.model is not None
    assert torch.equal(found.model.state_dict()["fc.weight"], expected.model.state_dict()["fc.weight"])


def test_a_process_that_dies_fails_its_client_alone(start: Start, clients: list[TensorDataset], tmp_path: Path) -> None:
    dying = functools.partial(_dies_once, tmp_path / "dead")
    history = start(clients=[*clients[:2], _Rows(clients[2], dying)], parallel=2, rounds=3)
    assert [record.clients for record in history.rounds] == [(0, 1), (0, 1, 2), (0, 1, 2)]
    assert history.failures == [(0, 2, "died: its process was ended by SIGKILL")]
    assert history.failures[0].cause == "died"


def test_reserves_take_the_place_of_the_dead(start: Start, clients: list[TensorDataset]) -> None:
    data = [*clients[:2], _Rows(clients[2], _dies)]
    options: dict[str, Any] = {"strategy": Strategy(clients_per_round=2, reserves=1), "rounds": 3, "clients": data}
    history = start(parallel=2, **options)
    assert [record.clients for record in history.rounds] == [(0, 1)] * 3


def test_a_client_that_hangs_is_ended(start: Start, clients: list[TensorDataset]) -> None:
    data = [_Rows(clients[0], _hangs)]
    with pytest.raises(RoundError, match=r"client 0, round 0: late: took .*expected at most 0\.2 s"):
        start(clients=data, parallel=2, rounds=1, strategy=Strategy(timeout_s=0.2))


def test_errors_that_cannot_be_sent_are_told(start: Start, clients: list[TensorDataset]) -> None:
    data = [*clients[:2], _Rows(clients[2], _raises)]
    history = start(clients=data, parallel=2, rounds=1)
    assert history.failures == start(clients=data, rounds=1).failures
    assert "/home" not in str(history.failures)


def test_what_cannot_be_sent_is_named(start: Start) -> None:
    with pytest.raises(ConfigError, match=r"parallel=2.*no lambdas"):
        start(parallel=2, loss_fn=lambda outputs, targets: _halved(outputs, targets) * 2)


@pytest.mark.parametrize("parallel", [0, -1, 1.5, True, "2"])
def test_numbers_of_processes_that_there_are_not(start: Start, parallel: object) -> None:
    with pytest.raises(ConfigError, match="parallel: got"):
        start(parallel=parallel)


def test_an_engine_that_there_is_not(start: Start) -> None:
    with pytest.raises(ConfigError, match="engine: got 'threads'; expected 'inprocess'"):
        start(engine="threads")
