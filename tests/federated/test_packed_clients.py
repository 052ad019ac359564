"""Clients store weights packed by default; a federation does not notice."""

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from fedmef_fx import Config, masks, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import LocalTraining, run
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.methods import METHODS
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.state import Schema, load_state, read_state
from fedmef_fx.models import digits_cnn
from fedmef_fx.sparse_model.parameters import masked_parameters
from tests.packed_models import build


@pytest.fixture(scope="module")
def digits() -> tuple[list[TensorDataset], TensorDataset]:
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    return [TensorDataset(x[i : i + 60], y[i : i + 60]) for i in (0, 60, 120)], TensorDataset(x[-200:], y[-200:])


def test_a_federation_on_digits_has_the_same_history(digits) -> None:
    clients, test = digits
    torch.manual_seed(0)
    net, histories = digits_cnn(), []
    for storage in ("dense", "packed"):
        training = LocalTraining(epochs=1, batch_size=32, learning_rate=0.02, weight_storage=storage)
        config = Config(density=0.3, adjustment_interval=1, weight_storage="dense")
        histories.append(run(net, clients, config, rounds=2, test=test, training=training))
    for left, right in zip(*(history.rounds for history in histories), strict=True):
        # Single precision: rows of kernels are summed in another order.
        assert right.train_loss == pytest.approx(left.train_loss, rel=1e-4)
        assert right.test_loss == pytest.approx(left.test_loss, rel=1e-4)
        assert right.test_accuracy == pytest.approx(left.test_accuracy, abs=0.006)  # one sample of 200
        assert right.churn == left.churn
        assert right.bytes_down == left.bytes_down
    assert histories[0].rounds[1].adjusted
    left, right = (masks(history.model) for history in histories)
    assert sum(int((left[name] != right[name]).sum()) for name in left) < 0.01 * sum(m.numel() for m in left.values())


def test_clients_pack_and_servers_need_not() -> None:
    model, _, _ = build("conv")
    sparse = transform(model, Config(density=0.3, weight_storage="dense"))
    assert LocalTraining().weight_storage == "packed"
    for storage, is_packed in (("packed", True), ("dense", False)):
        network = copy.deepcopy(sparse)
        Client(network, LocalTraining(weight_storage=storage))
        assert {parameter.is_packed for parameter in masked_parameters(network).values()} == {is_packed}
    with pytest.raises(ConfigError, match="weight_storage"):
        LocalTraining(weight_storage="sparse")


@pytest.mark.parametrize("given", ["dense", "packed"])
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_states_go_between_storages(storage: str, given: str) -> None:
    model, _, _ = build("grouped")
    source = transform(model, Config(density=0.3, weight_storage=given, seed=1))
    target = transform(model, Config(density=0.3, weight_storage=storage, seed=2))
    assert Schema.of(source) == Schema.of(target)
    state = read_state(source, version=3)
    load_state(target, state)
    back = read_state(target, version=3)
    for part in ("masks", "values", "dense"):
        left, right = getattr(state, part), getattr(back, part)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_packed_server_sends_and_adjusts_as_a_dense_one(digits) -> None:
    clients, _ = digits
    torch.manual_seed(0)
    net, results = digits_cnn().double(), []
    clients = [TensorDataset(x.double(), y) for x, y in (data.tensors for data in clients)]
    for storage in ("dense", "packed"):
        sparse = transform(net, Config(density=0.3, adjustment_interval=1, weight_storage=storage))
        server = Server(sparse, method=METHODS["fedmef"], rounds=3)
        client = Client(copy.deepcopy(sparse), LocalTraining(learning_rate=0.02, weight_storage=storage))
        for _ in range(2):
            update = server.receive(0, client.answer(server.broadcast(0), clients[0], client=0))
            server.finish_round({0: update})
        results.append(server.state)
    for name, mask in results[0].masks.items():
        assert torch.equal(mask, results[1].masks[name])
        assert torch.allclose(results[0].values[name], results[1].values[name], rtol=0, atol=1e-9)
