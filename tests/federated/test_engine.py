"""`federated.run`: whole runs of small federations."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError, DataError
from fedmef_fx.federated import METHODS, History, LocalTraining, Method, RoundRecord, run
from fedmef_fx.sparse_model.parameters import masked_parameters

FAST = LocalTraining(batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.3, adjustment_interval=2, weight_storage="dense")


def _weights(history: History) -> dict[str, torch.Tensor]:
    assert history.model is not None
    return history.model.state_dict()


def _assert_same(left: History, right: History) -> None:
    expected = _weights(right)
    assert all(torch.equal(value, expected[name]) for name, value in _weights(left).items())
    timeless = [[{**r.__class__.__dict__, **_fields(r)} for r in history.rounds] for history in (left, right)]
    assert timeless[0] == timeless[1]


def _fields(record: RoundRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__ if name != "seconds"}


def test_a_federation_learns(network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset) -> None:
    history = run(network, clients, CONFIG, rounds=8, test=test_set, training=FAST)
    first, last = history.rounds[0], history.rounds[-1]
    assert first.test_accuracy is not None
    assert last.test_accuracy is not None
    assert last.test_accuracy > max(0.8, first.test_accuracy)
    assert last.train_loss < first.train_loss
    assert history.test_accuracy == last.test_accuracy
    assert [record.adjusted for record in history.rounds] == [False, False, True, False, True, False, True, False]
    assert history.model is not None
    assert not history.model.training


def test_masks_move_and_the_density_stays(network: nn.Module, clients: list[TensorDataset]) -> None:
    history = run(network, clients, CONFIG, rounds=4, training=FAST)
    densities = {record.density for record in history.rounds}
    assert len(densities) == 1
    assert densities.pop() == pytest.approx(0.3, abs=1e-3)  # within one weight in total
    assert [sum(record.churn.values()) > 0 for record in history.rounds] == [False, False, True, False]
    assert history.model is not None
    for parameter, mask in masked_parameters(history.model).values():
        assert bool((parameter.detach()[~mask] == 0).all())


def test_the_callers_model_never_changes(network: nn.Module, clients: list[TensorDataset]) -> None:
    before = copy.deepcopy(network)
    run(network, clients, CONFIG, rounds=1, training=FAST)
    assert network.training
    assert type(network) is type(before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


def test_a_transformed_model_is_copied_as_well(sparse: Callable[..., nn.Module], clients: list[TensorDataset]) -> None:
    model = sparse(adjustment_interval=2)
    before = copy.deepcopy(model.state_dict())
    history = run(model, clients, rounds=3, training=FAST)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert history.rounds[2].adjusted
    _assert_same(
        history,
        run(
            model, clients, Config(density=0.3, adjustment_interval=2, weight_storage="dense"), rounds=3, training=FAST
        ),
    )


def test_a_run_can_be_repeated_to_the_bit(network: nn.Module, clients: list[TensorDataset]) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(run(network, clients, CONFIG, rounds=3, training=FAST, clients_per_round=2))
    _assert_same(*runs)


def test_the_seed_changes_masks_clients_and_batches(network: nn.Module, clients: list[TensorDataset]) -> None:
    runs = [run(network, clients, CONFIG.replace(seed=s), rounds=6, training=FAST, clients_per_round=1) for s in (0, 1)]
    assert [r.clients for r in runs[0].rounds] != [r.clients for r in runs[1].rounds]
    assert not torch.equal(_weights(runs[0])["conv2.weight_mask"], _weights(runs[1])["conv2.weight_mask"])


def test_clients_are_drawn_anew_in_every_round(network: nn.Module, clients: list[TensorDataset]) -> None:
    history = run(network, clients, CONFIG, rounds=6, training=FAST, clients_per_round=2)
    drawn = [record.clients for record in history.rounds]
    assert all(len(set(chosen)) == 2 and set(chosen) <= {0, 1, 2} for chosen in drawn)
    assert len(set(drawn)) > 1


def test_bytes_are_sparse_and_masks_travel_only_when_they_changed(
    network: nn.Module, clients: list[TensorDataset]
) -> None:
    history = run(network, clients, CONFIG.replace(density=0.1), rounds=5, training=FAST)
    dense = run(network, clients, CONFIG, rounds=1, training=FAST, method="fedavg")
    down = [record.bytes_down for record in history.rounds]
    up = [record.bytes_up for record in history.rounds]
    # Rounds: first contact, nothing new, counts of an adjustment, its new masks, counts of the next adjustment.
    assert down[0] > down[3] > down[1]
    assert up[2] > up[1] == up[3]
    assert up[2] - up[1] < dense.rounds[0].bytes_up
    assert max(down) < dense.rounds[0].bytes_down


def test_progress_sees_every_round(network: nn.Module, clients: list[TensorDataset]) -> None:
    seen: list[RoundRecord] = []
    history = run(network, clients, CONFIG, rounds=2, training=FAST, progress=seen.append)
    assert seen == history.rounds


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs(
    method: str, network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset
) -> None:
    history = run(network, clients, CONFIG, rounds=3, training=FAST, method=method, test=test_set)
    model = history.model
    assert model is not None
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == (method != "fedmef")
    assert not any(module.training for module in model.modules())
    assert fedmef_fx.density(model) == (1.0 if method == "fedavg" else pytest.approx(0.3, abs=1e-3))
    adjusts = method in ("fedmef", "fedtiny", "feddst", "prunefl", "fedrts", "fedfit")
    assert [record.adjusted for record in history.rounds] == [False, False, adjusts]
    assert [sum(record.churn.values()) > 0 for record in history.rounds] == [False, False, adjusts]
    steps = model.state_dict()["bn1.num_batches_tracked"]
    assert (int(steps) > 0) == (method != "fedmef")  # BatchNorm is alive in all baselines


def test_a_static_magnitude_mask_keeps_the_largest_weights(network: nn.Module, clients: list[TensorDataset]) -> None:
    weight = network.get_parameter("conv2.weight").detach().abs()
    history = run(network, clients, CONFIG, rounds=1, training=FAST, method="static-magnitude")
    mask = _weights(history)["conv2.weight_mask"]
    assert float(weight[mask].min()) >= float(weight[~mask].max())


def test_fedtiny_keeps_more_for_backward_than_fedmef(network: nn.Module, clients: list[TensorDataset]) -> None:
    fedmef, fedtiny = (run(network, clients, CONFIG, rounds=1, training=FAST, method=m) for m in ("fedmef", "fedtiny"))
    assert fedmef.rounds[0].peak_saved_bytes < 0.5 * fedtiny.rounds[0].peak_saved_bytes


def test_policies_of_ones_own(network: nn.Module, clients: list[TensorDataset]) -> None:
    method = Method(name="fedmef without packing", activations="dense")
    history = run(network, clients, CONFIG, rounds=3, training=FAST, method=method)
    assert history.settings["config"]["activation_sparsity"] == 0.0
    assert history.rounds[2].adjusted


@pytest.mark.parametrize(
    "options",
    [
        {"name": "x", "initial_mask": "dense", "extrudes": False},
        {"name": "x", "adjustment": "never"},
    ],
)
def test_policies_that_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Method 'x'"):
        Method(**options)


class _Regression(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), index / 10), torch.tensor([index / 5])


def test_any_data_set_and_loss(network: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    data = _Regression()
    history = run(
        model,
        [data, data],
        Config(density=0.5, weight_storage="dense"),
        rounds=2,
        test=data,
        loss_fn=F.mse_loss,
        training=FAST,
    )
    assert history.rounds[-1].test_loss is not None
    assert history.test_accuracy is None


def test_clients_of_a_single_sample(network: nn.Module, clients: list[TensorDataset]) -> None:
    small = [Subset(clients[0], [index]) for index in range(3)]
    history = run(network, small, CONFIG, rounds=3, training=FAST)
    assert len(history.rounds) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: got 0; expected an integer >= 1"),
        ({"rounds": 2.0}, "rounds"),
        ({"clients_per_round": 0}, r"clients_per_round: got 0; expected an integer in \[1, 3\]"),
        ({"clients_per_round": 4}, r"clients_per_round: got 4; expected an integer in \[1, 3\]"),
        ({"method": "fedprox"}, "method: got 'fedprox'; expected 'fedmef'"),
        ({"clients": []}, "got no clients"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str, network: nn.Module, clients: list[TensorDataset]) -> None:
    arguments: dict[str, Any] = {"clients": clients, "rounds": 1, **change}
    with pytest.raises(ConfigError, match=message):
        run(network, arguments.pop("clients"), **arguments)


def test_an_empty_client_is_named_before_anything_runs(network: nn.Module, clients: list[TensorDataset]) -> None:
    seen: list[RoundRecord] = []
    with pytest.raises(ConfigError, match=r"client 1, 3 has no samples.*leave empty clients out"):
        run(
            network,
            [clients[0], Subset(clients[0], []), clients[1], Subset(clients[1], [])],
            rounds=1,
            progress=seen.append,
        )
    assert seen == []


def test_an_empty_test_set(network: nn.Module, clients: list[TensorDataset]) -> None:
    with pytest.raises(ConfigError, match="test: got a data set without samples"):
        run(network, clients, rounds=1, test=Subset(clients[0], []))


class _Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1), index


def test_a_data_set_without_length(network: nn.Module) -> None:
    with pytest.raises(DataError, match="_Endless has no length"):
        run(network, [_Endless()], rounds=1)


def test_a_model_that_was_transformed_for_something_else(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset]
) -> None:
    with pytest.raises(ConfigError, match=r"density=0\.3 instead of 0\.2.*expected the original model"):
        run(sparse(), clients, Config(density=0.2, weight_storage="dense"), rounds=1)
    with pytest.raises(ConfigError, match=r"normalization='nsconv' instead of 'keep'.*'fedtiny'"):
        run(sparse(), clients, rounds=1, method="fedtiny")


@pytest.mark.gpu
def test_on_a_gpu(network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset) -> None:
    history = run(network, clients, CONFIG, rounds=4, test=test_set, training=FAST, device="cuda")
    assert history.model is not None
    assert next(history.model.parameters()).device.type == "cuda"
    assert history.rounds[2].adjusted
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
