"""The commands of a new app's README.md, as they stand there, and simulation on Ray: real processes, so slow ones."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from torch.utils.data import Subset
from toys import blobs, small_network

from fedmef_fx import Config
from fedmef_fx.commands.flower_app import files_of
from fedmef_fx.data import dirichlet_partition, load_digits
from fedmef_fx.federated import History, LocalRound, LocalTraining, Strategy, run
from fedmef_fx.models import digits_cnn

ROOT = Path(__file__).resolve().parents[2]

REFERENCE = """
import json, sys
from app_of_tests.task import CONFIG, METHOD, TRAINING, client_data, model, test_data
from fedmef_fx.federated import run
data = [client_data(client, 2) for client in range(2)]
history = run(model(), data, CONFIG, rounds=3, test=test_data(), training=TRAINING, method=METHOD)
history.save(sys.argv[1])
"""


def _app(directory: Path) -> Path:
    directory = directory / "app-of-tests"
    for name, text in files_of(directory.name).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def _blocks(directory: Path, heading: str) -> str:
    """The commands under a heading of the README, after those that stand before all headings."""
    parts = re.split(r"^## ", (directory / "README.md").read_text(), flags=re.MULTILINE)
    chosen = next(part for part in parts if part.startswith(heading))
    return "\n".join(re.findall(r"^```\n(.*?)^```", parts[0] + chosen, flags=re.MULTILINE | re.DOTALL))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _environment(directory: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}


@contextmanager
def _started(directory: Path, commands: str) -> Iterator[Iterator[str]]:
    """Lines of what commands print, in a process group of their own that is ended with the block."""
    link, *nodes = map(str, _free_ports(4))
    ports = {"8000": link, "909$client": f"$(( {nodes[0]} * (1 - client) + {nodes[1]} * client ))"}
    ports |= {f"909{index}": port for index, port in enumerate(nodes)}
    commands = re.sub(r"8000|909(\d|\$client)", lambda match: ports[match[0]], commands)
    commands = commands.replace('PYTHONPATH="$PWD"', f'PYTHONPATH="$PWD:{ROOT}"')
    with subprocess.Popen(  # noqa: S603  # our own commands
        ["bash", "-c", f"set -e\n{commands}"],  # noqa: S607  # as above
        cwd=directory,
        env=_environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield _until_the_end(process, process.stdout, directory / "run" / "history.json")
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def _until_the_end(process: subprocess.Popen[str], lines: Iterable[str], history: Path) -> Iterator[str]:
    """Lines until bash ends, whose background processes hold the pipe, or the history is there."""
    for line in lines:
        yield line
        if process.poll() is not None or history.exists():
            return


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["On this machine, without TLS", "With TLS and authentication of nodes"])
def test_the_documented_commands_give_what_one_process_gives(heading: str, tmp_path: Path) -> None:
    directory = _app(tmp_path)
    with _started(directory, _blocks(directory, heading)) as lines:
        shown = "".join(lines)
    expected = tmp_path / "expected.json"
    subprocess.run(  # noqa: S603  # as above
        [sys.executable, "-c", REFERENCE, str(expected)], env=_environment(directory), cwd=directory, check=True
    )
    assert (directory / "run" / "history.json").exists(), shown
    assert _fields(History.load(directory / "run" / "history.json")) == _fields(History.load(expected))


@pytest.mark.slow
def test_a_node_that_is_killed_holds_nothing_up_and_comes_back(tmp_path: Path) -> None:
    directory = _app(tmp_path)
    commands = _blocks(directory, "On this machine, without TLS").replace("output=", "rounds=8 output=")
    node = re.search(r"^(flower-supernode .*--port )(\d+)( .*partition-id=1') &$", commands, flags=re.MULTILINE)
    assert node is not None
    alone = f"setsid {node[1]}{node[2]}{node[3]} &\necho node $!"
    back = f"( until [ -e killed ]; do sleep 1; done; exec setsid {node[1]}9092{node[3]} ) &\necho node $!"
    commands = commands.replace(node[0], f"{alone}\n{back}")
    groups: list[int] = []
    shown = []
    with _started(directory, commands) as lines:
        try:
            for line in lines:
                shown.append(line)
                groups += [int(text) for text in re.findall(r"^node (\d+)", line)]
                if line.startswith("round 0"):
                    os.killpg(groups[0], signal.SIGKILL)
                if line.startswith("round 1"):
                    (directory / "killed").touch()
        finally:
            for group in groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
    history = History.load(directory / "run" / "history.json")
    assert [record.clients for record in history.rounds][:2] == [(0, 1), (0,)], "".join(shown)
    assert history.rounds[1].seconds < 90  # Flower misses its heartbeats after half a minute; `timeout_s` is 600
    assert history.rounds[-1].clients == (0, 1)
    assert {failure.cause for failure in history.failures} == {"died"}


def _fields(history: History) -> list[dict[str, Any]]:
    return [record.to_dict() | {"seconds": 0} for record in history.rounds]


class _Niceness(Strategy):
    """Clients say at which priority they run: behind other programs, a simulation would not get on."""

    def after_training(self, local: LocalRound) -> None:
        local.metrics["niceness"] = float(os.nice(0))


def _assert_simulated_alike(network: torch.nn.Module, data: list[Any], **options: Any) -> None:
    found = run(network, data, engine="flower-simulation", parallel=2, **options)
    expected = run(network, data, **options)
    assert found.failures == []
    assert found.model is not None
    assert expected.model is not None
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert _fields(found) == _fields(expected)


# Ray leaves files open and says what will change in it.
RAY_WARNS = pytest.mark.filterwarnings("default")


@pytest.mark.slow
@RAY_WARNS
def test_simulation_of_many_clients_gives_what_one_process_gives() -> None:
    pytest.importorskip("ray")
    data = [blobs(8 + index, seed=index) for index in range(20)]
    training, config = LocalTraining(batch_size=8, learning_rate=0.02), Config(density=0.3, adjustment_interval=2)
    _assert_simulated_alike(
        small_network(), data, config=config, training=training, rounds=3, strategy=_Niceness(clients_per_round=4)
    )


@pytest.mark.slow
@RAY_WARNS
def test_simulation_on_digits_gives_what_one_process_gives() -> None:
    pytest.importorskip("ray")
    digits, test = load_digits()
    shares = dirichlet_partition(digits.tensors[1], clients=2, alpha=0.5, seed=0)
    data = [Subset(digits, share.tolist()) for share in shares]
    training, config = LocalTraining(batch_size=64, epochs=1), Config(density=0.2, adjustment_interval=2)
    _assert_simulated_alike(digits_cnn(), data, config=config, training=training, rounds=3, test=test)
