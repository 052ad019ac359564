"""Clients that fail are left out of a round, which goes on; what they did is recorded."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError, RoundError
from fedmef_fx.federated import Client, Failure, History, LocalTraining, RoundRecord, Server, Strategy, run
from fedmef_fx.federated.checkpoint import FILE_NAME
from fedmef_fx.federated.failures import redacted

FAST = LocalTraining(batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.3, adjustment_interval=2)


class _Broken(Dataset[Any]):
    """Data of one client that fails when it is read."""

    def __init__(self, data: TensorDataset, error: Exception) -> None:
        self._data, self._error = data, error

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Any:
        raise self._error


def _scaled(data: TensorDataset, factor: float) -> TensorDataset:
    images, labels = data.tensors
    return TensorDataset(images * factor, labels)


def _answering(monkeypatch: pytest.MonkeyPatch, bad: int, change: Callable[[bytes], bytes]) -> None:
    """Let one client's answers be changed on their way."""
    honest = Client.answer

    def answer(self: Client, message: bytes, dataset: Dataset[Any], *, client: int) -> bytes:
        data = honest(self, message, dataset, client=client)
        return change(data) if client == bad else data

    monkeypatch.setattr(Client, "answer", answer)


def _weights(history: History) -> dict[str, Tensor]:
    assert history.model is not None
    return history.model.state_dict()


def _assert_equal(left: History, right: History) -> None:
    expected = _weights(right)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(left).items())


def test_a_client_whose_data_cannot_be_read(network: nn.Module, clients: list[TensorDataset]) -> None:
    data: list[Any] = [clients[0], _Broken(clients[1], OSError(5, "I/O error", "/home/ann/x.pt")), clients[2]]
    history = run(network, data, CONFIG, rounds=3, training=FAST)
    assert [record.clients for record in history.rounds] == [(0, 2)] * 3
    assert [(f.round_index, f.client, f.cause) for f in history.failures] == [(t, 1, "unreadable") for t in range(3)]
    assert "OSError" in history.failures[0].text
    assert "ann" not in history.failures[0].text


def test_failing_clients_are_the_same_as_absent_ones(network: nn.Module, clients: list[TensorDataset]) -> None:
    broken = [*clients[:2], _Broken(clients[2], KeyError("x"))]
    history = run(network, broken, CONFIG, rounds=4, training=FAST)
    _assert_equal(history, run(network, clients[:2], CONFIG, rounds=4, training=FAST))


def test_a_client_that_raises(network: nn.Module, clients: list[TensorDataset]) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(targets) == 1:
            raise RuntimeError("out of luck in /opt/fleet/loss.py")
        return F.cross_entropy(outputs, targets)

    single = TensorDataset(*clients[0][:1])
    history = run(network, [single, *clients], CONFIG, rounds=1, training=FAST, loss_fn=loss)
    assert history.failures == [(0, 0, "raised: RuntimeError: out of luck in <path>")]
    assert history.rounds[0].clients == (1, 2, 3)


def test_a_client_that_diverges(network: nn.Module, clients: list[TensorDataset]) -> None:
    history = run(network, [*clients, _scaled(clients[0], math.inf)], CONFIG, rounds=2, training=FAST)
    assert {(f.client, f.cause) for f in history.failures} == {(3, "diverged")}
    assert all(math.isfinite(record.train_loss) for record in history.rounds)


@pytest.mark.parametrize("change", [lambda _: b"", lambda data: data[:-1], lambda data: b"\0" * len(data)])
def test_a_client_that_answers_garbage(
    change: Callable[[bytes], bytes],
    network: nn.Module,
    clients: list[TensorDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _answering(monkeypatch, 1, change)
    history = run(network, clients, CONFIG, rounds=2, training=FAST)
    assert [(f.round_index, f.client, f.cause) for f in history.failures] == [(0, 1, "garbage"), (1, 1, "garbage")]


def test_a_client_that_is_late(network: nn.Module, clients: list[TensorDataset]) -> None:
    # Nothing is done in a nanosecond.
    with pytest.raises(RoundError, match="late: took"):
        run(network, clients, CONFIG, rounds=1, training=FAST, strategy=Strategy(timeout_s=1e-9))
    history = run(network, clients, CONFIG, rounds=1, training=FAST, strategy=Strategy(timeout_s=1e9))
    assert history.failures == []


def test_reserves_take_the_places_of_those_that_fail(network: nn.Module, clients: list[TensorDataset]) -> None:
    data: list[Any] = [*clients, _Broken(clients[0], ValueError("gone")), *clients]
    plain = Strategy(clients_per_round=2)
    reserved = Strategy(clients_per_round=2, reserves=5)
    for round_index in range(20):
        chosen = reserved.select(round_index, 7, seed=round_index)
        assert list(chosen[:2]) == list(plain.select(round_index, 7, seed=round_index))
        assert sorted(chosen) == list(range(7))
    history = run(network, data, CONFIG, rounds=6, training=FAST, strategy=reserved)
    assert [len(record.clients) for record in history.rounds] == [2] * 6
    assert {failure.client for failure in history.failures} == {3}
    # Where nobody fails no reserve is asked.
    sound = run(network, clients, CONFIG, rounds=2, training=FAST, strategy=Strategy(clients_per_round=2, reserves=1))
    _assert_equal(sound, run(network, clients, CONFIG, rounds=2, training=FAST, clients_per_round=2))


def test_a_round_without_quorum_leaves_the_model_as_it_was(
    network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset, tmp_path: Path
) -> None:
    class _Sometimes(_Broken):
        def __getitem__(self, index: int) -> Any:
            if len(seen) in (1, 2):  # rounds 1 and 2, an adjustment round
                raise self._error
            return self._data[index]

    seen: list[RoundRecord] = []
    data: list[Any] = [_Sometimes(part, ValueError("away")) for part in clients]
    history = run(
        network, data, CONFIG, rounds=5, training=FAST, test=test_set, progress=seen.append, checkpoint_dir=tmp_path
    )
    assert [len(record.clients) for record in history.rounds] == [3, 0, 0, 3, 3]
    assert [record.adjusted for record in history.rounds] == [False, False, False, False, True]
    assert history.rounds[1].test_loss == history.rounds[2].test_loss == history.rounds[0].test_loss
    assert math.isnan(history.rounds[1].train_loss)
    assert len(history.failures) == 6
    # The record survives JSON and the checkpoint.
    read = History.from_json(history.to_json())
    assert math.isnan(read.rounds[1].train_loss)
    assert read.failures == history.failures
    json.loads(history.to_json(), parse_constant=pytest.fail)
    again = run(network, data, CONFIG, rounds=5, training=FAST, test=test_set, checkpoint_dir=tmp_path)
    assert again.failures == history.failures
    assert str(again).splitlines()[2].split()[:2] == ["1", "0"]


def test_a_run_ends_where_patience_does(network: nn.Module, clients: list[TensorDataset], tmp_path: Path) -> None:
    data = [_Broken(part, ValueError("away")) for part in clients]
    seen: list[RoundRecord] = []
    with pytest.raises(RoundError, match=r"round 1: got 0 usable.*client 2, round 1: unreadable: .*away") as caught:
        run(
            network,
            data,
            CONFIG,
            rounds=9,
            training=FAST,
            strategy=Strategy(patience=2),
            progress=seen.append,
            checkpoint_dir=tmp_path,
        )
    assert len(seen) == 2
    assert caught.value.__cause__ is not None
    # What was mended goes on from there.
    history = run(network, clients, CONFIG, rounds=9, training=FAST, checkpoint_dir=tmp_path)
    assert [len(record.clients) for record in history.rounds] == [0, 0] + [3] * 7


def test_too_few_answers_are_no_quorum(network: nn.Module, clients: list[TensorDataset]) -> None:
    data = [*clients[:2], _Broken(clients[2], ValueError("away"))]
    with pytest.raises(RoundError, match="got 2 usable answers; expected at least 3"):
        run(network, data, CONFIG, rounds=1, training=FAST, strategy=Strategy(minimum=3))


def test_errors_inside_a_client_say_where(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    from fedmef_fx.federated import METHODS  # noqa: PLC0415  # for this test alone

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ZeroDivisionError("nothing to divide")

    client = Client(sparse(), FAST, loss_fn=loss)
    server = Server(sparse(), method=METHODS["fedmef"], rounds=3)
    with pytest.raises(ZeroDivisionError) as caught:
        client.answer(server.broadcast(7), clients[0], client=7)
    assert caught.value.__notes__ == ["in client 7, round 0"]


def test_losses_that_are_not_finite_are_recorded(network: nn.Module, clients: list[TensorDataset]) -> None:
    history = run(network, clients, CONFIG, rounds=2, training=FAST, test=_scaled(clients[0], math.nan))
    assert all(math.isnan(record.test_loss or 0.0) for record in history.rounds)
    read = History.from_json(history.to_json())
    assert math.isnan(read.rounds[0].test_loss or 0.0)
    assert "nan" in str(read)


def test_a_finished_run_is_extended(network: nn.Module, clients: list[TensorDataset], tmp_path: Path) -> None:
    config = CONFIG.replace(adjustment_stop=6)
    run(network, clients, config, rounds=3, training=FAST, checkpoint_dir=tmp_path)
    longer = run(network, clients, config, rounds=5, training=FAST, checkpoint_dir=tmp_path)
    assert [record.round_index for record in longer.rounds] == list(range(5))
    assert longer.settings["changes"] == [{"round": 3, "field": "rounds", "before": 3, "now": 5}]
    # Nothing in these rounds depends on how long the run is, so it is as if it had been that long from the start.
    _assert_equal(longer, run(network, clients, config, rounds=5, training=FAST))
    again = run(network, clients, config, rounds=5, training=FAST, checkpoint_dir=tmp_path)
    assert again.settings["changes"] == longer.settings["changes"]


def test_after_divergence_a_smaller_rate(network: nn.Module, clients: list[TensorDataset], tmp_path: Path) -> None:
    wild = LocalTraining(batch_size=8, learning_rate=1e30)
    with pytest.raises(RoundError, match=r"diverged.*smaller LocalTraining\.learning_rate"):
        run(network, clients, CONFIG, rounds=3, training=wild, checkpoint_dir=tmp_path)
    history = run(network, clients, CONFIG, rounds=5, training=FAST, checkpoint_dir=tmp_path)
    assert [len(record.clients) for record in history.rounds] == [0, 0, 0, 3, 3]
    assert [change["field"] for change in history.settings["changes"]] == ["training.learning_rate", "rounds"]


@pytest.mark.parametrize("kept", [1, 2])
def test_clients_leave_and_join(kept: int, network: nn.Module, clients: list[TensorDataset], tmp_path: Path) -> None:
    run(network, clients, CONFIG, rounds=2, training=FAST, checkpoint_dir=tmp_path)
    history = run(network, clients[:kept], CONFIG, rounds=4, training=FAST, checkpoint_dir=tmp_path)
    assert [len(record.clients) for record in history.rounds] == [3, 3, kept, kept]
    history = run(network, [*clients, clients[0]], CONFIG, rounds=6, training=FAST, checkpoint_dir=tmp_path)
    assert [len(record.clients) for record in history.rounds] == [3, 3, kept, kept, 4, 4]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training": LocalTraining(batch_size=8, learning_rate=0.02, epochs=7)}, r"training\.epochs: got 7"),
        ({"training": LocalTraining(batch_size=8, learning_rate=0.02, momentum=0.5)}, r"training\.momentum: got 0\.5"),
        ({"config": CONFIG.replace(seed=1)}, r"config\.seed: got 1"),
        ({"config": CONFIG.replace(adjustment_rate=0.1)}, r"config\.adjustment_rate: got 0\.1"),
        ({"method": "static-random"}, r"method\.\w+: got"),
        ({"rounds": 1}, r"rounds: got 1, the checkpoint has 2"),
    ],
)
def test_what_may_not_change_is_named(
    changes: dict[str, Any], field: str, network: nn.Module, clients: list[TensorDataset], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rounds": 2, "training": FAST, "config": CONFIG, "checkpoint_dir": tmp_path}
    run(network, clients, **options)
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=f"belongs to another run: {field}"):
        run(network, clients, **{**options, **changes})
    with pytest.raises(CheckpointError, match=r"client_samples\[0\]: got 9, the checkpoint has 24"):
        run(network, clients[1:], **options)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_strategy_ends_a_run(network: nn.Module, clients: list[TensorDataset]) -> None:
    class _Twice(Strategy):
        def after_round(self, record: RoundRecord, server: Server) -> bool:
            assert server.state.version == record.round_index + 1
            return record.round_index == 1

    assert len(run(network, clients, CONFIG, rounds=9, training=FAST, strategy=_Twice()).rounds) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserves": -1}, r"Strategy\.reserves: got -1; expected an integer >= 0"),
        ({"minimum": 0}, r"Strategy\.minimum"),
        ({"timeout_s": 0}, r"Strategy\.timeout_s: got 0; expected a number of seconds > 0"),
        ({"timeout_s": math.nan}, r"Strategy\.timeout_s"),
        ({"clients_per_round": 0}, r"Strategy\.clients_per_round"),
        ({"patience": 1.5}, r"Strategy\.patience"),
        ({"minimum": 4}, r"Strategy\.minimum: got 4; expected at most 3"),
        ({"clients_per_round": 4}, "clients_per_round: got 4"),
    ],
)
def test_strategies_that_cannot_be(
    options: dict[str, Any], message: str, network: nn.Module, clients: list[TensorDataset]
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(network, clients, CONFIG, rounds=1, strategy=Strategy(**options))


def test_two_numbers_of_clients(network: nn.Module, clients: list[TensorDataset]) -> None:
    with pytest.raises(ConfigError, match="expected one of the two"):
        run(network, clients, rounds=1, clients_per_round=1, strategy=Strategy(clients_per_round=2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no file /home/ann/data.pt here", "no file <path> here"),
        ("no file '/home/ann/my data.pt'", "no file '<path>"),
        (r"C:\Users\ann\x.pt: gone", "<path>: gone"),
        ("file:///srv/x", "file:<path>"),
        ("~/x.pt", "<path>"),
        (r"\\server\share\x", "<path>"),
        ("'dense/fc.weight': got 3 / 4", "'dense/fc.weight': got 3 / 4"),
        ("\n\nfirst\nsecond", "first"),
        ("", ""),
    ],
)
def test_paths_are_left_out(text: str, expected: str) -> None:
    assert redacted(text).startswith(expected)


@pytest.mark.parametrize("path", ["data/ann.pt", "/home/ann/my data.pt", r"..\ann"])
def test_paths_in_quotes_are_left_out_whole(path: str) -> None:
    failure = Failure.of(FileNotFoundError(2, "No such file", path), round_index=0, client=1)
    assert failure.reason.endswith("No such file: <path>")


def test_long_texts_are_cut() -> None:
    assert len(redacted("a" * 10_000)) == 300


@pytest.mark.parametrize("entry", [1, [], [0, 1], [0, 1, "x: y"], ["0", 1, "raised: x"], [0, 1, 2]])
def test_what_is_no_failure(entry: object) -> None:
    with pytest.raises(CheckpointError, match="failure: got"):
        Failure.from_json(entry)
