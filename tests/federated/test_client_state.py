"""A client that lives in one process after another: with what it kept, or by asking for everything anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedmef_fx
from fedmef_fx.errors import CheckpointError, MissingStateError, WireError
from fedmef_fx.federated import METHODS, Client, LocalTraining, Server
from fedmef_fx.federated.state import ModelState

TRAINING = LocalTraining(batch_size=8, learning_rate=0.02)
Maker = Callable[..., nn.Module]


def _played(server: Server, client: Client, data: TensorDataset) -> bytes:
    """A round of one client; returns its answer."""
    answer = client.answer(server.broadcast(0), data, client=0)
    server.finish_round({0: server.receive(0, answer)})
    return answer


def _server(sparse: Maker) -> Server:
    return Server(sparse(adjustment_interval=2), method=METHODS["fedmef"], rounds=5, run="a")


def _client(sparse: Maker) -> Client:
    return Client(sparse(adjustment_interval=2), TRAINING)


def test_a_process_per_round_answers_as_one_that_stays(
    sparse: Maker, clients: list[TensorDataset], tmp_path: Path
) -> None:
    staying, kept, path = _client(sparse), _server(sparse), tmp_path / "state"
    expected = [_played(kept, staying, clients[0]) for _ in range(5)]
    server, answers, sizes = _server(sparse), [], []
    for _ in range(5):
        client = _client(sparse)
        if path.exists():
            client.load(path)
        sizes.append(len(server.broadcast(0)))
        answers.append(_played(server, client, clients[0]))
        client.save(path)
    assert answers == expected
    assert max(sizes[1:]) < sizes[0]


def test_a_stateless_process_asks_for_a_complete_broadcast(sparse: Maker, clients: list[TensorDataset]) -> None:
    kept, server = _server(sparse), _server(sparse)
    staying = _client(sparse)
    expected = [_played(kept, staying, clients[0]) for _ in range(3)]
    answers = [_played(server, _client(sparse), clients[0])]
    for _ in range(2):
        with pytest.raises(MissingStateError, match="ask the server for a complete one"):
            _client(sparse).answer(server.broadcast(0), clients[0], client=0)
        server.forget(0)
        answers.append(_played(server, _client(sparse), clients[0]))
    assert answers == expected
    server.forget(17)  # nothing is known of it


def test_a_client_of_another_run_is_told_apart(sparse: Maker, clients: list[TensorDataset], tmp_path: Path) -> None:
    client = _client(sparse)
    _played(_server(sparse), client, clients[0])
    client.save(tmp_path / "state")
    other = Server(sparse(adjustment_interval=2), method=METHODS["fedmef"], rounds=5, run="b")
    other.known[0] = 0
    again = _client(sparse)
    again.load(tmp_path / "state")
    with pytest.raises(MissingStateError, match="run"):
        again.answer(other.broadcast(0), clients[0], client=0)


def test_before_the_first_round_there_is_nothing_to_keep(sparse: Maker, tmp_path: Path) -> None:
    _client(sparse).save(tmp_path / "state")
    client = _client(sparse)
    client.received = ModelState(0, {}, {}, {})
    client.load(tmp_path / "state")
    assert client.received is None


def test_what_strategies_keep_is_part_of_it(sparse: Maker, tmp_path: Path) -> None:
    client = _client(sparse)
    client.states[3] = {"control/fc.weight": torch.arange(3.0), "count": torch.tensor(2)}
    client.save(tmp_path / "state")
    again = _client(sparse)
    again.states[1] = {"left": torch.zeros(1)}
    again.load(tmp_path / "state")
    assert again.states.keys() == {3}
    assert all(torch.equal(again.states[3][name], tensor) for name, tensor in client.states[3].items())
    assert again.states[3].keys() == client.states[3].keys()


def test_what_is_kept_is_small(sparse: Maker, clients: list[TensorDataset], tmp_path: Path) -> None:
    client, server = _client(sparse), _server(sparse)
    _played(server, client, clients[0])
    client.save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_size < len(server.broadcast(1))
    again = _client(sparse)
    again.load(tmp_path / "state")
    assert again.received is not None
    assert client.received is not None
    assert again.received.mask_digest == client.received.mask_digest
    assert all(torch.equal(again.received.dense[name], t) for name, t in client.received.dense.items())


def test_damaged_files_are_named(sparse: Maker, clients: list[TensorDataset], tmp_path: Path) -> None:
    client, path = _client(sparse), tmp_path / "state"
    with pytest.raises(CheckpointError, match=r"state: cannot be read.*Client\.save"):
        client.load(path)
    _played(_server(sparse), client, clients[0])
    client.save(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for changed in (
        b"",
        data[:-1],
        data[: len(data) // 2],
        *(_flipped(data, at) for at in range(start, len(data), 97)),
    ):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"state: .*may be deleted"):
            client.load(path)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_files_of_another_model_and_folders_that_are_missing(
    sparse: Maker, clients: list[TensorDataset], tmp_path: Path
) -> None:
    client = _client(sparse)
    _played(_server(sparse), client, clients[0])
    client.save(tmp_path / "state")
    other = fedmef_fx.transform(nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 3)))
    with pytest.raises(CheckpointError, match="another model"):
        Client(other, TRAINING).load(tmp_path / "state")
    with pytest.raises(CheckpointError, match="there is no directory"):
        client.save(tmp_path / "missing" / "state")


def test_forged_masks_are_no_reason_to_ask(sparse: Maker, clients: list[TensorDataset]) -> None:
    with pytest.raises(WireError) as caught:
        _client(sparse).answer(b"nonsense", clients[0], client=0)
    assert not isinstance(caught.value, MissingStateError)
