"""The commands of a new app's README.md, as they stand there, and simulation on Ray: real processes, so slow ones."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from toys import blobs, small_network

from fedmef_fx import Config
from fedmef_fx.commands.flower_app import files_of
from fedmef_fx.federated import History, LocalTraining, run

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


def _executed(directory: Path, commands: str) -> str:
    """Run commands in a process group of their own, which is ended with them."""
    link, *nodes = _free_ports(3)
    commands = commands.replace("8000", str(link)).replace('PYTHONPATH="$PWD"', f'PYTHONPATH="$PWD:{ROOT}"')
    commands = commands.replace("909$client", f"$(( {nodes[0]} * (1 - client) + {nodes[1]} * client ))")
    for index, port in enumerate(nodes):
        commands = commands.replace(f"909{index}", str(port))
    process = subprocess.Popen(  # noqa: S603  # our own commands
        ["bash", "-c", f"set -e\n{commands}"],  # noqa: S607  # as above
        cwd=directory,
        env=_environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    try:
        assert process.stdout is not None
        for line in process.stdout:  # until bash ends: what it started in the background holds the pipe
            lines.append(line)
            if "Deactivat" in line or process.poll() is not None or (directory / "run" / "history.json").exists():
                break
        return "".join(lines)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["On this machine, without TLS", "With TLS and authentication of nodes"])
def test_the_documented_commands_give_what_one_process_gives(heading: str, tmp_path: Path) -> None:
    directory = _app(tmp_path)
    shown = _executed(directory, _blocks(directory, heading))
    expected = tmp_path / "expected.json"
    subprocess.run(  # noqa: S603  # as above
        [sys.executable, "-c", REFERENCE, str(expected)], env=_environment(directory), cwd=directory, check=True
    )
    assert (directory / "run" / "history.json").exists(), shown
    assert _fields(History.load(directory / "run" / "history.json")) == _fields(History.load(expected))


def _fields(history: History) -> list[dict[str, Any]]:
    return [record.to_dict() | {"seconds": 0} for record in history.rounds]


@pytest.mark.slow
@pytest.mark.parametrize("clients", [2, 20])
def test_simulation_gives_what_one_process_gives(clients: int) -> None:
    pytest.importorskip("ray")
    data = [blobs(8 + index, seed=index) for index in range(clients)]
    options: dict[str, Any] = {"rounds": 3, "training": LocalTraining(batch_size=8, learning_rate=0.02)}
    options["clients_per_round"] = min(clients, 4)
    network, config = small_network(), Config(density=0.3, adjustment_interval=2)
    found = run(network, data, config, engine="flower-simulation", parallel=2, **options)
    expected = run(network, data, config, **options)
    assert found.model is not None
    assert expected.model is not None
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in found.model.state_dict().items())
    assert _fields(found) == _fields(expected)
