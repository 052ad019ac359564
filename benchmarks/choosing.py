"""Density, rounds and learning rate: what a user can expect of today's defaults, on digits and on CIFAR-10.

    python benchmarks/choosing.py --log FILE [--seeds 3] [--minutes 30] [--tables ...] [--docs docs/choosing.md]

A small network (two convolutions with BatchNorm, 6,138 parameters) on few clients with few images each, 600 of
scikit-learn's digits, 5 clients, Dirichlet 0.5, 10 rounds: what people try first. Tables: methods
with all defaults, how much clients train per round, activations, the density, the rate. The tables named cifar take a
network of three convolutions (19,546 parameters) and 2,000 images of CIFAR-10 (FEDMEF_FX_DATA), 20 rounds. Everything
that a label does not name is the default of `Config` and `LocalTraining`. Finished cells stay in --log; those that were
not run are listed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from _cells import Problem, run_cells
from _machine import machine
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset, Subset

from fedmef_fx import Config
from fedmef_fx.data import dirichlet_partition, load_cifar10, load_digits
from fedmef_fx.federated import Contender, LocalTraining


def network() -> nn.Sequential:
    """8x8 images to 10 classes."""
    return nn.Sequential(*_features(1), nn.Flatten(), nn.Linear(128, 10))


def wider_network() -> nn.Sequential:
    """32x32 images in colour to 10 classes: one convolution more, 19,546 parameters."""
    return nn.Sequential(*_features(3, 32, 32), nn.Flatten(), nn.Linear(512, 10))


def _features(*inputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    widths = (16, 32) if len(inputs) == 1 else (16, 32, 32)
    for before, after in zip((inputs[0], *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return layers


def first_try() -> list[Contender]:
    """Methods with all defaults: what somebody sees who changes nothing."""
    names = ("fedmef", "static-random", "fedavg", "fedtiny", "fedrts", "feddst")
    all_data = Contender(label="fedmef, growth from all data", training=LocalTraining(growth_batches=None))
    return [*(Contender(label=name, method=name) for name in names), all_data]


def budgets() -> list[Contender]:
    """Local epochs and batch sizes."""
    found = []
    for epochs, batch in ((1, 32), (2, 16), (5, 32)):
        training = LocalTraining(epochs=epochs, batch_size=batch)
        for method in ("fedavg", "static-random", "fedmef"):
            label = f"{method}, {epochs} epochs, batch {batch}"
            found.append(Contender(label=label, method=method, training=training))
    return found


def activations() -> list[Contender]:
    """What is kept of activations, and when masks move."""
    changes: dict[str, dict[str, Any]] = {
        "defaults": {},
        "4 bits": {"activation_bits": 4},
        "1 bit": {"activation_bits": 1},
        "gamma 0.9": {"activation_sparsity": 0.9},
        "exact activations": {"activation_sparsity": 0.0},
        "first mask stays": {"adjustment_stop": 0},
        "adjusting every round": {"adjustment_interval": 1},
        "adjusting every 5": {"adjustment_interval": 5},
        "no extrusion": {"extrusion_strength": 0.0},
        "parameter space": {"adjustment_space": "parameter"},
    }
    return [Contender(label=f"fedmef, {name}", config=Config(**change)) for name, change in changes.items()]


def densities() -> list[Contender]:
    """Densities, FedMef and the static mask."""
    return [
        Contender(label=f"{method}, density {density}", method=method, config=Config(density=density))
        for density in (0.05, 0.1, 0.2, 0.4)
        for method in ("fedmef", "static-random")
    ]


def rates() -> list[Contender]:
    """Learning rates, with and without clipping."""
    found = []
    for rate in (0.01, 0.02, 0.05, 0.1, 0.2):
        training = LocalTraining(learning_rate=rate)
        found.append(Contender(label=f"fedmef, rate {rate}", training=training))
        if rate >= 0.1:
            clipped = Config(gradient_clipping=0.05)
            found.append(Contender(label=f"fedmef clipped, rate {rate}", config=clipped, training=training))
    return found


TABLES: Final[dict[str, Callable[[], list[Contender]]]] = {
    "first try": first_try,
    "local training": budgets,
    "activations and masks": activations,
    "density": densities,
    "learning rate": rates,
    "cifar first try": first_try,
    "cifar density": densities,
}


def problem_of(title: str) -> Problem:
    """The data, the network and the defaults of a table."""
    is_cifar = title.startswith("cifar")
    count, number, rounds = (2000, 5, 20) if is_cifar else (600, 5, 10)
    train, test = load_cifar10() if is_cifar else load_digits()
    labels = train.labels[:count] if is_cifar else train.tensors[1][:count]
    test = Subset(test, range(min(2000, len(test))))

    def clients(seed: int) -> Sequence[Dataset[Any]]:
        parts = dirichlet_partition(labels, clients=number, alpha=0.5, seed=seed)
        return [Subset(train, part.tolist()) for part in parts]

    return Problem(
        title=title,
        model=wider_network if is_cifar else network,
        clients=clients,
        test=test,
        config=Config(),
        training=LocalTraining(),
        rounds=rounds,
        data=f"{'CIFAR-10' if is_cifar else 'digits'}, {count} images, {number} clients, Dirichlet 0.5",
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="file of finished cells")
    parser.add_argument("--docs", type=Path, help="page whose tables are filled in")
    parser.add_argument("--curves", type=Path, help="folder for images of accuracy by rounds and bytes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no new cell is started")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    options = parser.parse_args()
    torch.set_num_threads(1)  # networks this small gain nothing from more
    console = Console()
    console.print(machine())
    until = time.monotonic() + 60 * options.minutes
    for title in options.tables:
        curves = None if options.curves is None else options.curves / f"choosing-{title.replace(' ', '-')}.png"
        run_cells(
            problem_of(title),
            TABLES[title](),
            range(options.seeds),
            log=options.log,
            until=until,
            console=console,
            docs=options.docs,
            curves=curves,
        )


if __name__ == "__main__":
    main()
