"""Density, rounds and learning rate: what a user can expect, on scikit-learn's digits.

    python benchmarks/choosing.py [--seeds 2] [--minutes 30] [--log DIR] [--tables density] [--images 600]
        [--clients 5] [--rounds 10]

A small network (two convolutions with BatchNorm, 6,064 weights) on few clients with few images each, Dirichlet 0.5:
the kind of federation that people try first. Three tables: how much clients train per round, the density, the rate.
With --log, cells are kept there: an interrupted benchmark goes on where it was. Cells that were not run are listed.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from _cells import Problem, run_cells
from _machine import machine
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fedmef_fx import Config
from fedmef_fx.data import dirichlet_partition, load_digits
from fedmef_fx.federated import Contender, LocalTraining

CODES: Final[dict[str, Any]] = {"activation_sparsity": 0.0, "activation_bits": 2, "adjustment_stop": 0}
"""No adjustments: what activations cost by themselves."""
OWN: Final[dict[str, Any]] = {
    "activation_sparsity": 0.0,
    "activation_bits": 2,
    "adjustment_interval": 3,
    "adjustment_space": "effective",
}


def network() -> nn.Sequential:
    """8x8 images to 10 classes."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


def budgets() -> list[Contender]:
    """Local epochs and batch sizes."""
    found = []
    for epochs, batch in ((1, 32), (2, 16), (5, 32)):
        training = LocalTraining(epochs=epochs, batch_size=batch)
        end = f"{epochs} epochs, batch {batch}"
        found.append(Contender(label=f"fedavg, {end}", method="fedavg", training=training))
        found.append(Contender(label=f"static-random, {end}", method="static-random", training=training))
        found.append(
            Contender(
                label=f"fedmef gamma 0.9, {end}",
                config=Config(activation_sparsity=0.9, activation_bits=None, adjustment_stop=0),
                training=training,
            )
        )
        found.append(Contender(label=f"fedmef 2 bits, {end}", config=Config(**CODES), training=training))
        for interval in (2, 3):
            config = Config(**{**OWN, "adjustment_interval": interval})
            found.append(
                Contender(label=f"fedmef 2 bits adjusting every {interval}, {end}", config=config, training=training)
            )
    return found


def densities() -> list[Contender]:
    """Densities, FedMef and the static mask."""
    found = []
    for density in (0.05, 0.1, 0.2, 0.4):
        config = Config(density=density, **OWN)
        found.append(Contender(label=f"fedmef, density {density}", config=config))
        found.append(Contender(label=f"static-random, density {density}", method="static-random", config=config))
    return found


def rates() -> list[Contender]:
    """Learning rates, with and without clipping."""
    found = []
    for rate in (0.01, 0.02, 0.05, 0.1, 0.2):
        training = LocalTraining(epochs=2, batch_size=16, learning_rate=rate)
        config = Config(**OWN)
        found.append(Contender(label=f"fedmef, rate {rate}", config=config, training=training))
        if rate >= 0.1:
            clipped = config.replace(gradient_clipping=0.05)
            found.append(Contender(label=f"fedmef clipped, rate {rate}", config=clipped, training=training))
    return found


TABLES: Final[dict[str, Callable[[], list[Contender]]]] = {
    "local training": budgets,
    "density": densities,
    "learning rate": rates,
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no new cell is started")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--log", type=Path, help="folder for cells and curves")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    console = Console()
    console.print(machine())
    until = time.monotonic() + 60 * options.minutes
    train, test = load_digits()
    images = TensorDataset(*(tensor[: options.images] for tensor in train.tensors))

    def clients(seed: int) -> Sequence[Dataset[Any]]:
        shares = dirichlet_partition(images.tensors[1], clients=options.clients, alpha=0.5, seed=seed)
        return [Subset(images, share.tolist()) for share in shares]

    training = LocalTraining(epochs=2, batch_size=16)
    with tempfile.TemporaryDirectory() as temporary:
        log = options.log or Path(temporary)
        for title in options.tables:
            problem = Problem(title, network, clients, test, Config(), training, options.rounds)
            run_cells(problem, TABLES[title](), range(options.seeds), log=log, until=until, console=console)


if __name__ == "__main__":
    main()
