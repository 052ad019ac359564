"""The files of a Flower app, as text."""

import re
from string import Template
from typing import Final

from fedmef_fx import __version__

__all__ = ["files_of"]


def files_of(name: str) -> dict[str, str]:
    """Path of each file in the app's directory -> its text.

    Args:
        name: Of the app.
    """
    project = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "app"
    package = re.sub(r"^(?=\d)", "app_", project.replace("-", "_"))
    if package in ("flwr", "fedmef_fx", "torch"):
        package = f"{package}_app"
    values = {"project": project, "package": package, "version": __version__}
    templates = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{package}/__init__.py": _INIT,
        f"{package}/task.py": _TASK,
        f"{package}/server_app.py": _SERVER,
        f"{package}/client_app.py": _CLIENT,
    }
    return {path: Template(text).substitute(values) for path, text in templates.items()}


_PYPROJECT: Final = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$project"
version = "1.0.0"
description = "Federated training of a sparse model with fedmef_fx on Flower"
license = "Apache-2.0"
dependencies = ["fedmef-fx[flower]>=$version"]

[tool.hatch.build.targets.wheel]
packages = ["$package"]

[tool.flwr.app]
publisher = "local"

[tool.flwr.app.components]
serverapp = "$package.server_app:app"
clientapp = "$package.client_app:app"

[tool.flwr.app.config]
clients = 2
rounds = 3
output = ""
"""

_INIT: Final = '''\
"""A Flower app of fedmef_fx."""
'''

_TASK: Final = '''\
"""What server and clients share: model, configuration, training, data. Put your own here."""

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from fedmef_fx import Config
from fedmef_fx.data import dirichlet_partition, load_digits
from fedmef_fx.federated import LocalTraining
from fedmef_fx.models import digits_cnn

CONFIG = Config(density=0.2)
TRAINING = LocalTraining(epochs=1)
METHOD = "fedmef"

# The last bits of results depend on the number of threads: with the same on all machines they are the same everywhere.
torch.set_num_threads(1)


def model() -> nn.Module:
    """The model, with the same weights everywhere."""
    torch.manual_seed(CONFIG.seed)
    return digits_cnn()


def client_data(client: int, clients: int) -> Dataset:
    """The data of a client. A real one reads its own instead."""
    digits, _ = load_digits()
    shares = dirichlet_partition(digits.tensors[1], clients=clients, alpha=0.5, seed=CONFIG.seed)
    return Subset(digits, shares[client].tolist())


def test_data() -> Dataset:
    """What the server tests the global model on."""
    return load_digits()[1]
'''

_SERVER: Final = '''\
"""The ServerApp."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from $package.task import CONFIG, METHOD, TRAINING, model, test_data
from fedmef_fx.federated import RoundRecord, Strategy, flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and write the history beside the checkpoint where `output` names a directory."""
    config = context.run_config
    output = Path(str(config["output"])) if config["output"] else None
    history = flower.serve(
        grid,
        model(),
        CONFIG,
        clients=int(config["clients"]),
        rounds=int(config["rounds"]),
        test=test_data(),
        training=TRAINING,
        method=METHOD,
        strategy=Strategy(timeout_s=600),
        checkpoint_dir=None if output is None else output / "rounds",
        progress=report,
    )
    print(history)
    if output is not None:
        history.save(output / "history.json")


def report(record: RoundRecord) -> None:
    """Show how a round went."""
    print(f"round {record.round_index}: clients {record.clients}, accuracy {record.test_accuracy}", flush=True)
'''

_CLIENT: Final = '''\
"""The ClientApp."""

from flwr.app import Context

from $package.task import CONFIG, METHOD, TRAINING, client_data, model
from fedmef_fx.federated import flower


def setup(context: Context) -> flower.ClientSetup:
    """Who this node is, and what it has: from the --node-config of its SuperNode."""
    client = int(context.node_config["partition-id"])
    return flower.ClientSetup(
        client=client,
        data=client_data(client, int(context.run_config["clients"])),
        model=model(),
        config=CONFIG,
        method=METHOD,
        training=TRAINING,
    )


app = flower.client_app(setup)
'''

_README: Final = """\
# $project

A federation of fedmef_fx on Flower. `$package/task.py` has model, configuration and data.

Every command below runs in bash, in this directory, in an environment with `pip install 'fedmef-fx[flower]'`, after

```
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export FLWR_HOME="$$PWD/.flwr" PYTHONPATH="$$PWD"
mkdir -p "$$FLWR_HOME"
```

## On this machine, without TLS

```
cat > "$$FLWR_HOME/config.toml" <<'END'
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:8000"
insecure = true
END
flower-superlink --insecure --port 8000 --database state.db --disable-runtime-dependency-installation &
until (exec 3<>/dev/tcp/127.0.0.1/8000) 2> /dev/null; do sleep 1; done
flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9090 --node-config 'partition-id=0' &
flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9091 --node-config 'partition-id=1' &
flwr run . here --stream --run-config "output=\\"$$PWD/run\\""
```

## With TLS and authentication of nodes

Certificates of an authority of your own, and a key for each node, on a curve of NIST:

```
mkdir -p keys
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -days 365 -subj /CN=authority \\
    -keyout keys/authority.key -out keys/authority.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:secp384r1 -nodes -subj /CN=127.0.0.1 \\
    -keyout keys/server.key -out keys/server.csr
printf 'subjectAltName=IP:127.0.0.1,DNS:localhost' > keys/names
openssl x509 -req -in keys/server.csr -CA keys/authority.crt -CAkey keys/authority.key -CAcreateserial -days 365 \\
    -extfile keys/names -out keys/server.crt
for client in 0 1; do
    ssh-keygen -q -t ecdsa -b 384 -N '' -C '' -f keys/node-$$client
done
cat > "$$FLWR_HOME/config.toml" <<END
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:8000"
root-certificates = "$$PWD/keys/authority.crt"
END
flower-superlink --port 8000 --database state.db --disable-runtime-dependency-installation --enable-supernode-auth \\
    --ssl-ca-certfile keys/authority.crt --ssl-certfile keys/server.crt --ssl-keyfile keys/server.key &
until (exec 3<>/dev/tcp/127.0.0.1/8000) 2> /dev/null; do sleep 1; done
for client in 0 1; do flwr supernode register keys/node-$$client.pub here; done
for client in 0 1; do
    flower-supernode --superlink 127.0.0.1:8000 --port 909$$client --root-certificates keys/authority.crt \\
        --auth-supernode-private-key keys/node-$$client --node-config "partition-id=$$client" &
done
flwr run . here --stream --run-config "output=\\"$$PWD/run\\""
```

Authentication of nodes keeps strangers from training. The same port takes runs from whoever reaches it and presents no
credentials: let only operators reach it.

`kill $$(jobs -p)` ends them. A run that was interrupted goes on when it is started again with the same `output`.
"""
