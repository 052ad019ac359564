"""A server that is killed, in whatever phase of a round, goes on to the same bits, and loses a round at most."""

import os
from pathlib import Path

import pytest

from tests import forked

# Forks the runs that are killed, so that only one process has to import torch. Each phase is a function of the engine;
# the process is killed as it begins, in the second round and in the third, which adjusts masks.
SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from conftest import blobs, small_network
from fedmef_fx import Config
from fedmef_fx.federated import LocalTraining, Strategy, client, one_round, playing, run, server
from fedmef_fx.federated.engines import in_turn
from fedmef_fx.files import atomic

torch.set_num_threads(1)
ROUNDS = 3

class Remembering(Strategy):
    def after_training(self, local):
        local.remember("last", local.weights())
    def before_step(self, local):
        local.add_to_gradients({{name: 0.1 * tensor for name, tensor in local.recall("last").items()}})
    def server_step(self, averaged, updates, now):
        changes, before = now.changes(averaged), now.recall("velocity", averaged)
        velocity = {{name: 0.5 * before[name] + change for name, change in changes.items()}}
        now.remember("velocity", velocity, averaged)
        return now.moved(averaged, velocity)

def told(record):
    pass

def train(directory):
    torch.manual_seed(0)
    clients = [blobs(size, seed=seed) for seed, size in enumerate([9, 8, 10])]
    return run(
        small_network(), clients, Config(density=0.3, adjustment_interval=2, adjustment_stop=9), rounds=ROUNDS,
        training=LocalTraining(batch_size=8, learning_rate=0.02, epochs=1), method="fedrts", test=blobs(9, seed=7),
        strategy=Remembering(clients_per_round=2), checkpoint_dir=directory, progress=lambda record: told(record),
    )

PHASES = {{
    "select": (Strategy, "select"),
    "send": (in_turn.InTurn, "send"),
    "train": (client, "train_locally"),
    "answer": (client, "encode_update"),
    "receive": (server.Server, "receive"),
    "average and adjust": (server.Server, "finish_round"),
    "server step": (Remembering, "server_step"),
    "evaluate": (one_round, "evaluation_of"),
    "save": (playing, "save_checkpoint"),
    "write": (Path, "write_bytes"),
    "flush": (atomic.os, "fsync"),
    "rename": (atomic.os, "replace"),
    "flush the folder": (atomic, "_sync_folder"),
    "tell": (sys.modules["__main__"], "told"),
}}

def killed(directory, owner, name, calls):
    child = os.fork()
    if child == 0:
        original, left = getattr(owner, name), [calls]
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if name == "write_bytes":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        setattr(owner, name, call)
        train(directory)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, calls, status)

def digest(history):
    weights = history.model.state_dict()
    fields = [{{**record.to_dict(), "seconds": 0}} for record in history.rounds]
    return {{name: tensor.clone() for name, tensor in weights.items()}}, fields

root = Path(sys.argv[1])
weights, fields = digest(train(root / "whole"))
per_round = {{"send": 2, "train": 2, "answer": 2, "receive": 2, "flush": 2}}
for phase, (owner, name) in PHASES.items():
    directory = root / phase.replace(" ", "-")
    # Twice in one run: killed in its second round, and again after it has gone on.
    killed(directory, owner, name, per_round.get(phase, 1) + 1)
    killed(directory, owner, name, 1)
    found_weights, found_fields = digest(train(directory))
    assert found_fields == fields, phase
    assert all(torch.equal(found_weights[key], tensor) for key, tensor in weights.items()), phase
    assert [path.name for path in directory.iterdir()] == ["federation.safetensors"], phase
print(len(PHASES))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the processes that it kills")
def test_goes_on_after_a_kill_in_every_phase(tmp_path: Path) -> None:
    result = forked.run(SCRIPT.format(tests=str(Path(__file__).parent)), str(tmp_path), folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 14
