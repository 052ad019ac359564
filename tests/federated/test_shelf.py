"""Updates that wait in a temporary file, and are averaged block by block, give the same bits."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.federated import (
    CoordinateMedian,
    History,
    Krum,
    LocalTraining,
    NormClipping,
    Server,
    Strategy,
    TrimmedMean,
    aggregation,
    averaging,
    run,
    server,
)
from fedmef_fx.federated.averaging import Candidates, weighted_candidates
from fedmef_fx.federated.shelf import Shelf
from fedmef_fx.federated.state import read_state
from fedmef_fx.sparsity.sparse_gradient import SparseGradient, average_sparse_gradients

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.3, adjustment_interval=1)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    def start() -> None:
        monkeypatch.setattr(server, "Shelf", lambda memory: Shelf(0))
        monkeypatch.setattr(averaging, "_TERMS", 64)
        monkeypatch.setattr(aggregation, "_TERMS", 64)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    return start


def _play(network: nn.Module, clients: list[TensorDataset], **options: Any) -> History:
    return run(network, [*clients, *clients[:2]], CONFIG, rounds=2, training=FAST, **options)


KINDS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("fedmef", "feddst", "prunefl", "fedfit", "fedrts", "ssfl")},
    "clipping": {"strategy": Strategy(aggregator=NormClipping(0.05))},
    "trimmed": {"strategy": Strategy(aggregator=TrimmedMean(0.2), minimum=3)},
    "median": {"strategy": Strategy(aggregator=CoordinateMedian(), minimum=3)},
    "krum": {"strategy": Strategy(aggregator=Krum(1), minimum=5)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_same(
    kind: str, network: nn.Module, clients: list[TensorDataset], on_disk: Callable[[], None], tmp_path: Path
) -> None:
    expected = _play(network, clients, **KINDS[kind])
    on_disk()
    found = _play(network, clients, **KINDS[kind])
    assert not found.failures
    assert found.model is not None
    assert expected.model is not None
    left, right = read_state(found.model, version=0), read_state(expected.model, version=0)
    assert left.mask_digest == right.mask_digest
    assert all(torch.equal(values, right.values[name]) for name, values in left.values.items())
    assert all(torch.equal(tensor, right.dense[name]) for name, tensor in left.dense.items())
    assert list(tmp_path.iterdir()) == []


def test_updates_stay_in_memory_as_long_as_they_are_few(
    sparse: Callable[..., nn.Module], clients: list[TensorDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedmef_fx.federated import METHODS, Client  # noqa: PLC0415  # for this test alone

    made: list[Any] = []
    temporary = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: made.append(temporary()) or made[-1])
    center = Server(sparse(), method=METHODS["fedmef"], rounds=3, update_memory=5000)
    peer = Client(sparse(), FAST)
    updates = {}
    for client, data in enumerate([*clients, *clients, *clients]):
        updates[client] = center.receive(client, peer.answer(center.broadcast(client), data, client=client))
    assert len(made) == 1
    assert type(updates[0].values) is dict
    assert type(updates[8].values) is not dict
    assert list(updates[8].values) == list(updates[0].values)
    assert updates[8].values["fc.weight"].shape == updates[0].values["fc.weight"].shape
    center.finish_round(updates)


def test_candidates_of_blocks_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    gradients = [SparseGradient(torch.randperm(1000)[:k].sort().values, torch.randn(k), 1000) for k in (200, 0, 1, 150)]
    weights = [3.0, 1.0, 2.0, 7.0]
    expected = average_sparse_gradients(list(zip(gradients, weights, strict=True)))
    monkeypatch.setattr(averaging, "_TERMS", 30)
    clients = [Candidates(gradient.positions, gradient.values, 1000) for gradient in gradients]
    found = weighted_candidates(clients, weights)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.values, expected.values)
    best = weighted_candidates(clients, weights, keep=40)
    chosen = expected.values.abs().topk(40).indices.sort().values
    assert torch.equal(best.positions, expected.positions[chosen])
    assert torch.equal(best.values, expected.values[chosen])
