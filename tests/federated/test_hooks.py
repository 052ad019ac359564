"""What a strategy of one's own can do: server optimizers, client state, extra tensors, unequal training, numbers."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError, RoundError, WireError
from fedmef_fx.federated import (
    METHODS,
    Client,
    History,
    LocalRound,
    LocalTraining,
    ModelState,
    RoundRecord,
    RoundTask,
    Server,
    ServerRound,
    Strategy,
    Update,
    run,
)

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.05, momentum=0.0, schedule="constant")
CONFIG = Config(density=0.4, adjustment_interval=1)


def _example(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "fedadam": _example("fedadam").FedAdam,
    "fedavgm": _example("fedavgm").FedAvgM,
    "fedprox": _example("fedprox").FedProx,
    "scaffold": _example("scaffold").Scaffold,
}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def _data(samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    return TensorDataset(torch.randn(samples, 6, generator=generator) + nn.functional.one_hot(labels, 6), labels)


CLIENTS = [_data(size, seed) for seed, size in enumerate([24, 9, 17])]


def _play(net: nn.Module, strategy: Strategy | None = None, **changes: Any) -> History:
    options: dict[str, Any] = {"rounds": 3, "training": FAST, "strategy": strategy, **changes}
    return run(net, options.pop("clients", CLIENTS), options.pop("config", CONFIG), **options)


def _weights(history: History) -> dict[str, Tensor]:
    assert history.model is not None
    return history.model.state_dict()


def _assert_same(left: History, right: History) -> None:
    expected = _weights(right)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(left).items())


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_example_goes_on_to_the_bit(name: str, net: nn.Module, tmp_path: Path) -> None:
    whole = _play(net, STRATEGIES[name](), clients_per_round=2)
    seen: list[RoundRecord] = []

    class _KilledError(BaseException):
        pass

    def kill(record: RoundRecord) -> None:
        seen.append(record)
        if len(seen) == 2:
            raise _KilledError

    with pytest.raises(_KilledError):
        _play(net, STRATEGIES[name](), clients_per_round=2, checkpoint_dir=tmp_path, progress=kill)
    again = _play(net, STRATEGIES[name](), clients_per_round=2, checkpoint_dir=tmp_path)
    assert len(seen) == 2
    _assert_same(again, whole)
    assert not whole.failures
    plain = _weights(_play(net, clients_per_round=2))
    assert any(not torch.equal(value, plain[name]) for name, value in _weights(whole).items())


@pytest.mark.parametrize(("name", "method"), [("scaffold", "feddst"), ("fedadam", "feddst"), ("fedprox", "prunefl")])
def test_an_example_fits_methods(name: str, method: str, net: nn.Module) -> None:
    history = _play(net, STRATEGIES[name](), method=method, rounds=2)
    assert not history.failures
    assert all(math.isfinite(record.train_loss) for record in history.rounds)


@pytest.mark.parametrize("name", ["fedprox", "scaffold"])
def test_storage_of_weights_makes_no_difference(name: str, net: nn.Module) -> None:
    packed, dense = (
        _weights(_play(net, STRATEGIES[name](), training=dataclasses.replace(FAST, weight_storage=storage), config=c))
        for storage, c in (("packed", CONFIG), ("dense", CONFIG.replace(weight_storage="packed")))
    )
    # Sums are taken in another order.
    assert all(torch.allclose(value, dense[key], atol=1e-5) for key, value in packed.items())


def test_momentum_of_nothing_is_the_average(net: nn.Module) -> None:
    strategy = _example("fedavgm").FedAvgM(momentum=0.0)
    plain = _weights(_play(net))
    # Sent + (average - sent) rounds where the average does not.
    assert all(torch.allclose(value, plain[key], atol=1e-6) for key, value in _weights(_play(net, strategy)).items())


def test_momentum_by_hand(net: nn.Module) -> None:
    moves: list[dict[str, Tensor]] = []

    class _Recorded(_example("fedavgm").FedAvgM):  # type: ignore[misc]  # a class of a script
        def server_step(self, averaged: ModelState, updates: Sequence[Update], now: ServerRound) -> ModelState:
            moves.append(now.changes(averaged))
            new: ModelState = super().server_step(averaged, updates, now)
            velocity = moves[0]["0.bias"] if len(moves) == 1 else 0.6 * moves[0]["0.bias"] + moves[1]["0.bias"]
            assert torch.allclose(new.dense["0.bias"], now.sent.dense["0.bias"] + velocity, atol=1e-7)
            # Running statistics are averages, whatever the optimizer.
            assert new.dense["1.running_mean"] is averaged.dense["1.running_mean"]
            return new

    _play(net, _Recorded(), rounds=2, config=CONFIG.replace(normalization="keep"))
    assert len(moves) == 2


def test_control_variates_sum_up(net: nn.Module, tmp_path: Path) -> None:
    from fedmef_fx.federated.checkpoint import load_checkpoint  # noqa: PLC0415  # for this test alone
    from fedmef_fx.federated.state import Schema  # noqa: PLC0415  # the same

    history = _play(net, STRATEGIES["scaffold"](), checkpoint_dir=tmp_path)
    assert history.model is not None
    checkpoint = load_checkpoint(tmp_path, Schema.of(history.model))
    assert checkpoint is not None
    # All clients took part in all rounds, so the server's is the mean of theirs: also under masks that changed.
    names = [name for name in checkpoint.memory if name.startswith("control/value/")]
    assert len(names) > 3
    for name in names:
        own = torch.stack([kept[name] for kept in checkpoint.clients.values()]).mean(0)
        assert torch.allclose(checkpoint.memory[name], own, atol=1e-5)
    assert sum(bool(checkpoint.memory[name].any()) for name in names) > 3


def test_the_proximal_term_holds_clients_back(net: nn.Module) -> None:
    make = _example("fedprox").FedProx
    moved = [_play(net, make(mu=mu), rounds=1).rounds[0].metrics["moved"] for mu in (0.0, 1.0, 10.0)]
    assert moved[0] > moved[1] > moved[2] > 0
    _assert_same(_play(net, make(mu=0.0)), _play(net))


def test_a_client_trains_otherwise(net: nn.Module) -> None:
    class _Unequal(Strategy):
        def local_training(
            self, training: LocalTraining, task: RoundTask, *, client: int, samples: int
        ) -> LocalTraining:
            return dataclasses.replace(training, epochs=1 + client, batch_size=samples)

        def after_training(self, local: LocalRound) -> None:
            assert local.step == local.steps
            local.metrics["steps"] = local.steps

    history = _play(net, _Unequal())
    assert not history.failures
    assert [history.rounds[0].by_client[client]["steps"] for client in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("given", [None, LocalTraining(weight_storage="dense")])
def test_training_that_cannot_be(given: Any, net: nn.Module) -> None:
    class _Wrong(Strategy):
        def local_training(self, *_: Any, **__: Any) -> LocalTraining:
            return given  # type: ignore[no-any-return]  # wrong on purpose

    with pytest.raises(RoundError, match=r"local_training: client 2, round 0: .*weight_storage='packed'"):
        _play(net, _Wrong(), rounds=1)


def test_optimizers_by_factory(net: nn.Module) -> None:
    adam = dataclasses.replace(FAST, optimizer="adam", schedule="cosine")
    own = dataclasses.replace(adam, optimizer=lambda parameters, rate: torch.optim.Adam(parameters, lr=rate))
    _assert_same(_play(net, training=own), _play(net, training=adam))

    def two_groups(parameters: Any, rate: float) -> torch.optim.Optimizer:
        matrices, others = (
            [p for p in parameters if (p.dim() > 1) == matrix]
            for parameters, matrix in ((list(parameters), True), (list(net.parameters()), False))
        )
        del others
        return torch.optim.SGD(
            [{"params": matrices, "lr": rate}, {"params": [nn.Parameter(torch.ones(1))], "lr": 3 * rate}]
        )

    rates: list[list[float]] = []

    class _Watched(Strategy):
        def before_step(self, local: LocalRound) -> None:
            rates.append([group["lr"] for group in local.optimizer.param_groups])

    training = dataclasses.replace(FAST, optimizer=two_groups, schedule="cosine", weight_storage="dense")
    history = _play(net, _Watched(), training=training, rounds=1, config=CONFIG.replace(weight_storage="dense"))
    assert all(math.isclose(second, 3 * first) for first, second in rates)
    assert rates[1][0] < rates[0][0]
    assert history.settings["training"]["optimizer"].endswith("two_groups")
    with pytest.raises(RoundError, match=r"LocalTraining\.optimizer: .* made a list; expected a torch\.optim"):
        _play(net, rounds=1, training=dataclasses.replace(FAST, optimizer=lambda parameters, rate: [rate]))  # type: ignore[arg-type,return-value]  # wrong on purpose


def test_numbers_of_clients_and_server(net: nn.Module) -> None:
    class _Counting(Strategy):
        def after_training(self, local: LocalRound) -> None:
            local.metrics["samples twice"] = 2.0 * local.samples
            if local.client == 1:
                local.metrics["bad"] = math.nan

        def metrics(self, server: Server) -> Mapping[str, float]:
            return {"version": server.state.version}

    history = _play(net, _Counting(), rounds=2)
    sizes = [24, 9, 17]
    expected = sum(2 * size * size for size in sizes) / sum(sizes)
    record = history.rounds[1]
    assert math.isclose(record.metrics["samples twice"], expected)
    assert record.metrics["version"] == 2
    assert math.isnan(record.metrics["bad"])
    assert [record.by_client[client]["samples"] for client in range(3)] == sizes
    assert sum(numbers["bytes_up"] for numbers in record.by_client.values()) == record.bytes_up
    read = History.from_json(history.to_json()).rounds[1]
    assert math.isnan(read.by_client[1].pop("bad"))
    assert math.isnan(read.metrics.pop("bad"))
    assert math.isnan(record.by_client[1].pop("bad"))
    assert math.isnan(record.metrics.pop("bad"))
    assert read == record


@pytest.mark.parametrize(
    "metrics",
    [{"x" * 65: 1.0}, {"\n": 1.0}, {"x": torch.ones(2)}, {"x": True}, {str(i): 0.0 for i in range(65)}, {3: 1.0}],
)
def test_numbers_that_cannot_be_sent(metrics: Any, net: nn.Module) -> None:
    class _Wrong(Strategy):
        def after_training(self, local: LocalRound) -> None:
            local.metrics.update(metrics)

    with pytest.raises(RoundError, match=r"LocalRound\.metrics: got"):
        _play(net, _Wrong(), rounds=1)


def test_numbers_of_a_server_that_are_none(net: nn.Module) -> None:
    class _Wrong(Strategy):
        def metrics(self, server: Server) -> Mapping[str, float]:
            return {"x": "much"}  # type: ignore[dict-item]  # wrong on purpose

    with pytest.raises(ConfigError, match=r"_Wrong\.metrics: got 'x': 'much'"):
        _play(net, _Wrong(), rounds=1)


class _Sending(Strategy):
    """Sends what it is told to, and expects one tensor."""

    def __init__(self, reply: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._reply = reply

    def expected(self, now: ServerRound) -> Mapping[str, Tensor]:
        return {"counts": torch.zeros(3)}

    def after_training(self, local: LocalRound) -> None:
        local.reply.update(self._reply)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({}, "'extra/counts' is missing"),
        ({"counts": torch.zeros(4)}, r"'extra/counts': got torch.float32\[4\]"),
        ({"counts": torch.zeros(3).double()}, r"'extra/counts': got torch.float64\[3\]"),
        ({"counts": torch.tensor([1.0, math.nan, 0.0])}, "infinite values or NaN"),
        ({"counts": torch.full((3,), 1e20)}, r"'extra/counts': got values of up to 1e\+20"),
        ({"counts": torch.zeros(3), "more": torch.zeros(1)}, "unknown tensors"),
        ({"counts": torch.zeros(3), "more": torch.zeros(10**6)}, "expected at most"),
    ],
)
def test_replies_that_were_not_expected(reply: Mapping[str, Tensor], message: str, net: nn.Module) -> None:
    with pytest.raises(RoundError, match=message) as caught:
        _play(net, _Sending(reply), rounds=1)
    assert isinstance(caught.value.__cause__, WireError)
    assert not _play(net, _Sending({"counts": torch.ones(3)}), rounds=1).failures


def test_extras_reach_only_clients_that_know_of_them(net: nn.Module) -> None:
    class _Telling(Strategy):
        def extras(self, client: int, now: ServerRound) -> Mapping[str, Tensor]:
            return {"number": torch.tensor([client, now.round_index])}

        def before_training(self, local: LocalRound) -> None:
            assert local.task.extras["number"].tolist() == [local.client, local.task.round_index]

    assert not _play(net, _Telling()).failures
    model = fedmef_fx.transform(net, CONFIG)
    server = Server(model, method=METHODS["fedmef"], rounds=2, strategy=_Telling())
    client = Client(fedmef_fx.transform(net, CONFIG), FAST)
    with pytest.raises(WireError, match="unknown tensors"):
        client.answer(server.broadcast(0), CLIENTS[0], client=0)


def test_what_a_client_keeps_counts_once_it_has_answered(net: nn.Module) -> None:
    class _Counting(Strategy):
        def after_training(self, local: LocalRound) -> None:
            count = local.state.get("count", torch.zeros(()))
            local.state["count"] = count + 1
            if local.client == 1 and local.task.round_index == 1:
                raise ValueError("out of luck")
            local.metrics["count"] = float(local.state["count"])

    history = _play(net, _Counting())
    assert [f.client for f in history.failures] == [1]
    assert {client: numbers["count"] for client, numbers in history.rounds[2].by_client.items()} == {0: 3, 1: 2, 2: 3}


def test_masks_are_adjusted_as_a_strategy_says(net: nn.Module) -> None:
    class _Still(Strategy):
        def adjust(self, after: Any, policy: Any) -> dict[str, int]:
            return {} if after.round_index == 1 else policy.finish(after)

    usual, still = (
        [sum(record.churn.values()) for record in _play(net, strategy).rounds] for strategy in (None, _Still())
    )
    assert usual[1] > 0
    assert still[1] == 0


def test_moves_of_another_form(net: nn.Module) -> None:
    class _Wrong(Strategy):
        def server_step(self, averaged: ModelState, updates: Sequence[Update], now: ServerRound) -> ModelState:
            return now.moved(averaged, {"0.weight": torch.zeros(12, 6)})

    with pytest.raises(ConfigError, match=r"moved: '0\.weight': got \[12, 6\]"):
        _play(net, _Wrong(), rounds=1)


def test_each_client_has_a_test_set(net: nn.Module) -> None:
    tests = [_data(10, 50), None, _data(10, 51)]
    history = _play(net, Strategy(clients_per_round=1, evaluate_every=2), client_tests=tests, test=_data(30, 5))
    assert [record.test_loss is None for record in history.rounds] == [True, False, False]
    assert "test_loss" not in str(history.rounds[0].by_client)
    for record in history.rounds[1:]:
        assert {c for c, numbers in record.by_client.items() if "test_accuracy" in numbers} == {0, 2}
        assert {c for c, numbers in record.by_client.items() if "loss" in numbers} == set(record.clients)


def test_records_of_before_are_read(net: nn.Module) -> None:
    fields = json.loads(json.dumps(_play(net, rounds=1).rounds[0].to_dict()))
    del fields["metrics"], fields["by_client"]
    assert RoundRecord.from_dict(fields).by_client == {}
    with pytest.raises(CheckpointError, match="round record"):
        RoundRecord.from_dict({**fields, "by_client": {"x": {}}})
    with pytest.raises(CheckpointError, match="round record"):
        RoundRecord.from_dict({**fields, "metrics": {"x": "much"}})


def test_a_client_in_a_process_per_round_keeps_its_state(net: nn.Module, tmp_path: Path) -> None:
    class _Counting(Strategy):
        def after_training(self, local: LocalRound) -> None:
            local.state["count"] = local.state.get("count", torch.zeros(())) + 1
            local.metrics["count"] = float(local.state["count"])

    server = Server(fedmef_fx.transform(net, CONFIG), method=METHODS["fedmef"], rounds=3, strategy=_Counting())
    for expected in (1.0, 2.0, 3.0):
        client = Client(fedmef_fx.transform(net, CONFIG), FAST, strategy=_Counting())
        if expected > 1:
            client.load(tmp_path / "client")
        update = server.receive(2, client.answer(server.broadcast(2), CLIENTS[2], client=2))
        assert update.metrics == {"count": expected}
        server.finish_round({2: update})
        client.save(tmp_path / "client")
