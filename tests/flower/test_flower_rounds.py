"""Rounds over a grid: the results of `run`, and nodes that fail, hang, vanish or forget."""

import threading
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from grids import FakeGrid
from torch.utils.data import Dataset, TensorDataset
from toys import blobs, small_network

from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError, RoundError
from fedmef_fx.federated import History, LocalRound, LocalTraining, Strategy, flower, run
from fedmef_fx.federated.flower.parcels import packed, payload_of

CONFIG = Config(density=0.3, adjustment_interval=2)
TRAINING = LocalTraining(batch_size=8, learning_rate=0.02, epochs=1)


class _Remembering(Strategy):
    def after_training(self, local: LocalRound) -> None:
        local.remember("last", local.weights())

    def before_step(self, local: LocalRound) -> None:
        local.add_to_gradients({name: 0.1 * tensor for name, tensor in local.recall("last").items()})


class _Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        raise OSError("cannot read /home/somebody/rows.bin")


def _data(clients: int) -> list[TensorDataset]:
    return [blobs(8 + index, seed=index) for index in range(clients)]


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return small_network()


def _app(data: list[Any], **options: Any) -> Any:
    def setup(context: Context) -> flower.ClientSetup:
        client = int(context.node_config["partition-id"])
        return flower.ClientSetup(
            client=client, data=data[client], model=_network(), config=CONFIG, training=TRAINING, **options
        )

    return flower.client_app(setup)


def _served(grid: FakeGrid, clients: int, **options: Any) -> History:
    options = {"rounds": 3, "test": blobs(20, seed=99), "training": TRAINING, "wait_s": 5.0, **options}
    return flower.serve(grid, _network(), CONFIG, clients=clients, **options)


def _run(data: list[Any], **options: Any) -> History:
    options = {"rounds": 3, "test": blobs(20, seed=99), "training": TRAINING, **options}
    return run(_network(), data, CONFIG, **options)


def _assert_same(found: History, expected: History) -> None:
    assert found.model is not None
    assert expected.model is not None
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert [record.to_dict() | {"seconds": 0} for record in found.rounds] == [
        record.to_dict() | {"seconds": 0} for record in expected.rounds
    ]
    assert found.failures == expected.failures


@pytest.mark.parametrize(("clients", "per_round"), [(2, None), (20, 5)])
def test_the_same_results_as_in_one_process(clients: int, per_round: int | None) -> None:
    data, strategy = _data(clients), Strategy(clients_per_round=per_round)
    _assert_same(_served(FakeGrid(_app(data), clients), clients, strategy=strategy), _run(data, strategy=strategy))


def test_what_strategies_keep_of_clients_stays_at_the_nodes() -> None:
    data, strategy = _data(2), _Remembering()
    grid = FakeGrid(_app(data, strategy=strategy), 2)
    _assert_same(_served(grid, 2, strategy=strategy), _run(data, strategy=strategy))


def test_a_node_that_forgot_is_sent_everything_anew() -> None:
    data = _data(2)
    grid = FakeGrid(_app(data), 2)
    grid.forgetful = {101}
    found, expected = _served(grid, 2), _run(data)
    assert found.model is not None
    assert expected.model is not None
    assert torch.equal(found.model.state_dict()["fc.weight"], expected.model.state_dict()["fc.weight"])
    assert found.failures == []
    assert found.bytes_down > expected.bytes_down
    assert grid.trains == 3 * 2 + 2


def test_errors_of_a_node_are_told_without_paths() -> None:
    data = [*_data(2), _Broken()]
    found = _served(FakeGrid(_app(data), 3), 3)
    assert [failure.cause for failure in found.failures] == ["unreadable"] * 3
    assert "/home" not in str(found.failures)
    assert [record.clients for record in found.rounds] == [(0, 1)] * 3


def test_errors_of_flower_are_failures_of_the_node() -> None:
    grid = FakeGrid(_app(_data(2)), 2)
    grid.broken = {101}
    found = _served(grid, 2)
    assert {failure.reason for failure in found.failures} == {"died: Flower error 1"}
    assert [record.clients for record in found.rounds] == [(0,)] * 3


def test_a_node_that_hangs_is_late() -> None:
    grid = FakeGrid(_app(_data(2)), 2)
    _served(grid, 2, rounds=1)
    grid.silent = {100, 101}
    with pytest.raises(RoundError, match=r"client 1, round 0: late: took .* expected at most 0\.1 s"):
        _served_when_known(grid)


def _served_when_known(grid: FakeGrid) -> None:
    """Nodes say who they are and then no more."""
    silent, grid.silent = grid.silent, set()

    class _Then(Strategy):
        def select(self, round_index: int, clients: int, *, seed: int) -> list[int]:
            grid.silent = silent
            return list(range(clients))

    _served(grid, 2, rounds=1, strategy=_Then(timeout_s=0.1))


def test_a_node_that_is_gone_fails_and_comes_back() -> None:
    grid = FakeGrid(_app(_data(3)), 3)

    class _Vanishing(Strategy):
        def select(self, round_index: int, clients: int, *, seed: int) -> list[int]:
            grid.gone = {102} if round_index == 1 else set()
            return list(range(clients))

    found = _served(grid, 3, strategy=_Vanishing())
    assert [record.clients for record in found.rounds] == [(0, 1, 2), (0, 1), (0, 1, 2)]
    assert found.failures == [(1, 2, "died: no node of this client is connected")]


def test_nodes_that_vanish_while_they_train_hold_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmef_fx.federated.flower.grid_peers._LOOK_S", 0.0)
    grid = FakeGrid(_app(_data(2)), 2)
    pull = grid.pull_messages

    def pulled(identities: Any) -> Any:
        replies = pull(identities)
        if grid.trains:
            grid.gone = {101}
        return replies

    grid.silent, grid.pull_messages = {101}, pulled  # type: ignore[method-assign]  # for this test
    grid.contexts[101].node_config["partition-id"] = 1
    with pytest.raises(RoundError, match="got nodes of 1 clients"):
        _served(grid, 2, wait_s=0.1)
    grid.silent = set()

    class _Then(Strategy):
        def select(self, round_index: int, clients: int, *, seed: int) -> list[int]:
            grid.silent = {101}
            return list(range(clients))

    found = _served(grid, 2, rounds=1, strategy=_Then())
    assert found.failures == [(0, 1, "died: its node is gone")]


def test_a_server_that_repeats_a_round_gets_the_same_answers(tmp_path: Any) -> None:
    data, strategy = _data(2), _Remembering()
    expected = _run(data, strategy=strategy)
    grid = FakeGrid(_app(data, strategy=strategy), 2)

    class _KilledError(BaseException):
        pass

    class _Killed(_Remembering):
        def server_step(self, averaged: Any, updates: Any, now: Any) -> Any:
            if now.round_index == 1:
                raise _KilledError
            return averaged

        def settings(self) -> Any:
            return strategy.settings()

    with pytest.raises(_KilledError):
        _served(grid, 2, strategy=_Killed(), checkpoint_dir=tmp_path)
    found = _served(grid, 2, strategy=strategy, checkpoint_dir=tmp_path)
    assert found.model is not None
    assert expected.model is not None
    assert torch.equal(found.model.state_dict()["fc.weight"], expected.model.state_dict()["fc.weight"])


def test_a_folder_keeps_what_nodes_have_for_another_flower_run(tmp_path: Any) -> None:
    data, strategy = _data(2), _Remembering()
    expected = _run(data, strategy=strategy)
    app = _app(data, strategy=strategy, state_dir=tmp_path / "nodes")
    config = CONFIG.replace(adjustment_stop=3)
    options = {"strategy": strategy, "checkpoint_dir": tmp_path / "rounds"}
    _served(FakeGrid(app, 2), 2, rounds=2, **options)
    found = _served(FakeGrid(app, 2), 2, rounds=3, **options)
    assert config.adjustment_stop == 3
    assert found.model is not None
    assert expected.model is not None
    assert len(list((tmp_path / "nodes").iterdir())) == 4
    assert len(found.rounds) == 3


def test_numbers_that_nobody_has_are_waited_for() -> None:
    with pytest.raises(RoundError, match=r"got nodes of 2 clients.*no.*client 2"):
        _served(FakeGrid(_app(_data(2)), 2), 3, wait_s=0.1)


def test_nodes_may_take_their_time_to_say_who_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmef_fx.federated.flower.nodes._PAUSE_S", 0.0)
    data = _data(2)
    grid = FakeGrid(_app(data), 2)
    grid.silent, pull, looks = {100, 101}, grid.pull_messages, 0

    def pulled(identities: Any) -> Any:
        nonlocal looks
        looks += 1
        grid.silent = {100, 101} if looks < 5 else {101} if looks < 9 else set()
        return pull(identities)

    grid.pull_messages = pulled  # type: ignore[method-assign]  # for this test
    _assert_same(_served(grid, 2), _run(data))
    assert grid.queries == 2


def test_nodes_that_do_not_answer_are_told_of() -> None:
    grid = FakeGrid(_app(_data(2)), 2)
    grid.silent = {101}
    with pytest.raises(RoundError, match=r"client 1\. Start .*nodes that were asked and have not answered: 1"):
        _served(grid, 2, wait_s=0.0)


def test_of_two_nodes_with_a_number_the_second_stands_in_for_the_first() -> None:
    data = _data(2)
    grid = FakeGrid(_app(data), 3)
    grid.contexts[102].node_config["partition-id"] = 0

    class _Vanishing(Strategy):
        def select(self, round_index: int, clients: int, *, seed: int) -> list[int]:
            grid.gone = {100} if round_index else set()
            return list(range(clients))

    found = _served(grid, 2, strategy=_Vanishing())
    assert [record.clients for record in found.rounds] == [(0, 1)] * 3
    assert found.failures == []


def test_a_node_whose_data_changed_is_told_of() -> None:
    grid = FakeGrid(_app(data := _data(2)), 2)

    class _Swapping(Strategy):
        def select(self, round_index: int, clients: int, *, seed: int) -> list[int]:
            if round_index == 1:
                data[1] = blobs(30, seed=3)
                grid.gone = {101}
            return list(range(clients))

        def after_round(self, record: Any, server: Any) -> None:
            grid.gone = set()

    found = _served(grid, 2, strategy=_Swapping())
    gone = "died: no node of this client is connected"
    assert found.failures == [(1, 1, gone), (2, 1, f"{gone}; a node said: client 1 has 30 samples; it had 9 before")]


@pytest.mark.parametrize("options", [{"clients": 0}, {"clients": 2, "rounds": 0}])
def test_arguments_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"flower\.serve: (clients|rounds): got 0"):
        _served(FakeGrid(_app(_data(2)), 2), **options)


def test_a_message_holds_one_array_of_bytes() -> None:
    content = packed(b"abc", round=3)
    assert payload_of(content) == b"abc"
    assert [len(record) for record in content.array_records.values()] == [1]
    assert RecordDict is type(content)


def test_other_peoples_checkpoints_are_refused(tmp_path: Any) -> None:
    grid = FakeGrid(_app(_data(2)), 2)
    _served(grid, 2, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="method"):
        _served(grid, 2, checkpoint_dir=tmp_path, method="static-random")


def test_a_simulation_that_ends_by_itself_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")

    def crashing(server_app: ServerApp, client_app: ClientApp, **_: Any) -> None:
        grid = FakeGrid(client_app, 2)
        grid.silent = {100, 101}
        context = Context(0, 0, {}, RecordDict(), {})
        threading.Thread(target=server_app, args=(grid, context), daemon=True).start()
        raise RuntimeError("no room for Ray's objects")

    monkeypatch.setattr("fedmef_fx.federated.flower.simulation.run_simulation", crashing)
    with pytest.raises(RoundError, match=r"simulation has ended: no room for Ray's objects"):
        _run(_data(2), engine="flower-simulation")
