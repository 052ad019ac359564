"""A run that was killed continues from its last finished round, to the bit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError
from fedmef_fx.federated import History, LocalTraining, RoundRecord, run
from fedmef_fx.federated.checkpoint import FILE_NAME
from fedmef_fx.files import atomic
from tests import forked

ROUNDS = 4
CONFIG = Config(density=0.3, adjustment_interval=2, weight_storage="dense")
TRAINING = LocalTraining(batch_size=8, learning_rate=0.02)


class _KilledError(BaseException):
    """Stands for the end of the process: nothing may catch it."""


Runner = Callable[..., History]


@pytest.fixture
def start(network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset) -> Runner:
    def call(directory: Path | None, **changes: Any) -> History:
        options: dict[str, Any] = {"rounds": ROUNDS, "training": TRAINING, "clients_per_round": 2, **changes}
        config = options.pop("config", CONFIG)
        data = options.pop("clients", clients)
        return run(network, data, config, test=test_set, checkpoint_dir=directory, **options)

    return call


@pytest.fixture
def uninterrupted(start: Runner) -> History:
    return start(None)


def _assert_same(found: History, expected: History) -> None:
    assert found.model is not None
    assert expected.model is not None
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert [_fields(record) for record in found.rounds] == [_fields(record) for record in expected.rounds]


def _fields(record: RoundRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__ if name != "seconds"}


@pytest.mark.parametrize("finished", range(1, ROUNDS + 1))
def test_continues_after_any_round(finished: int, start: Runner, uninterrupted: History, tmp_path: Path) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round_index + 1 == finished:
            raise _KilledError

    with pytest.raises(_KilledError):
        start(tmp_path, progress=stop)
    seen: list[int] = []
    resumed = start(tmp_path, progress=lambda record: seen.append(record.round_index))
    assert seen == list(range(finished, ROUNDS))
    _assert_same(resumed, uninterrupted)


def _file_operations(monkeypatch: pytest.MonkeyPatch, *, fail_at: int) -> Callable[[], int]:
    """Let the process "die" just before a file operation; returns how many there were."""
    count = 0

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fail_at:
                raise _KilledError
            return operation(*args, **kwargs)

        return call

    def half_written(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            counted(file.write)(data[: len(data) // 2])
            return counted(file.write)(data[len(data) // 2 :])  # type: ignore[no-any-return]  # it is an int

    monkeypatch.setattr(Path, "write_bytes", half_written)
    monkeypatch.setattr(atomic.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(atomic.os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    return lambda: count


def test_continues_when_killed_between_any_two_file_operations(
    start: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = start(None, rounds=2)
    with monkeypatch.context() as patch:
        operations = _file_operations(patch, fail_at=0)
        start(tmp_path / "count", rounds=2)
    assert operations() >= 2 * 4
    for fail_at in range(1, operations() + 1):
        directory = tmp_path / str(fail_at)
        with monkeypatch.context() as patch:
            _file_operations(patch, fail_at=fail_at)
            with pytest.raises(_KilledError):
                start(directory, rounds=2)
        _assert_same(start(directory, rounds=2), expected)
        assert [path.name for path in directory.iterdir()] == [FILE_NAME]


# Forks the runs that are killed, so that only one process has to import torch.
SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from conftest import blobs, small_network
from fedmef_fx import Config
from fedmef_fx.federated import LocalTraining, run

torch.set_num_threads(1)
moments, kills = random.Random(0), 0

def train(directory):
    torch.manual_seed(0)
    clients = [blobs(size, seed=seed) for seed, size in enumerate([24, 9, 17])]
    training = LocalTraining(batch_size=8, learning_rate=0.02)
    config = Config(density=0.3, adjustment_interval=2)
    return run(small_network(), clients, config, rounds=8, training=training, checkpoint_dir=directory).model

def killed_after(seconds, directory):
    child = os.fork()
    if child == 0:
        train(directory)
        os._exit(0)
    time.sleep(seconds)
    finished, _ = os.waitpid(child, os.WNOHANG)
    if not finished:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return not finished

whole, killed = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "killed"
while kills < 6 and killed_after(moments.uniform(0.05, 0.5), killed):
    kills += 1
expected, found = train(whole).state_dict(), train(killed).state_dict()
assert all(torch.equal(found[name], value) for name, value in expected.items())
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that it kills")
def test_continues_when_killed_at_random_moments(tmp_path: Path) -> None:
    result = forked.run(SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 1


def test_a_finished_run_is_only_read(start: Runner, uninterrupted: History, tmp_path: Path) -> None:
    start(tmp_path)
    before = (tmp_path / FILE_NAME).stat().st_mtime_ns
    seen: list[RoundRecord] = []
    again = start(tmp_path, progress=seen.append)
    assert seen == []
    assert (tmp_path / FILE_NAME).stat().st_mtime_ns == before
    _assert_same(again, uninterrupted)


def test_resume_false_starts_over(start: Runner, tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    seen: list[RoundRecord] = []
    start(tmp_path, rounds=2, resume=False, progress=seen.append)
    assert [record.round_index for record in seen] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "rounds: got 1, the checkpoint has 2"),
        ({"training": LocalTraining(epochs=2)}, "training"),
        ({"config": CONFIG.replace(seed=1)}, "config"),
        ({"method": "static-random"}, "method"),
        ({"clients_per_round": None}, "clients_per_round"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], message: str, start: Runner, tmp_path: Path
) -> None:
    start(tmp_path, rounds=2)
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(CheckpointError, match=f"belongs to another.*{message}.*resume=False"):
        start(tmp_path, **{"rounds": 2, **changes})
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_other_clients_are_refused(start: Runner, clients: list[TensorDataset], tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    with pytest.raises(CheckpointError, match="client_samples"):
        start(tmp_path, rounds=1, clients=clients[1:])


def test_a_checkpoint_of_another_architecture_is_refused(
    start: Runner, clients: list[TensorDataset], tmp_path: Path
) -> None:
    start(tmp_path, rounds=1)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(CheckpointError, match=r"another architecture.*resume=False"):
        run(wider, clients, CONFIG, rounds=1, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(share: float, start: Runner, tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=rf"{FILE_NAME}.*to start over, delete the file"):
        start(tmp_path, rounds=1)


def test_every_flipped_byte_is_noticed(start: Runner, tmp_path: Path) -> None:
    start(tmp_path, rounds=1)
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    # Spaces that pad the header may change without a consequence; there are fewer than 8.
    header_end = 8 + int.from_bytes(data[:8], "little")
    for index in range(0, len(data), 211):
        if header_end - 8 <= index < header_end:
            continue
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(CheckpointError):
            start(tmp_path, rounds=1)


def test_a_directory_that_cannot_be_made(start: Runner, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a directory"):
        start(tmp_path / "file" / "run", rounds=1)


@pytest.mark.parametrize("method", ["fedrts", "snip"])
def test_what_a_method_remembers_is_part_of_the_checkpoint(start: Runner, tmp_path: Path, method: str) -> None:
    expected = start(None, method=method, config=CONFIG.replace(adjustment_stop=9))

    def kill(record: RoundRecord) -> None:
        if record.round_index == 2:  # the first adjustment is over
            raise _KilledError

    with pytest.raises(_KilledError):
        start(tmp_path, method=method, config=CONFIG.replace(adjustment_stop=9), progress=kill)
    _assert_same(start(tmp_path, method=method, config=CONFIG.replace(adjustment_stop=9)), expected)
