"""Which weights the server should prune: the lowest of the average, or those that clients were told to empty.

    python benchmarks/pruned_set.py [--seeds 2] [--rounds 10] [--spaces effective parameter]

The federation of the demonstration on scikit-learn's digits (`fedmef_fx.federated.demo`), adjusted every second round
until three quarters of the run. "after adjustments" is the mean test loss right after the rounds that adjust.
"""

import argparse
import statistics

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table

from fedmef_fx.data import dirichlet_partition, load_digits
from fedmef_fx.federated import History, Method, run
from fedmef_fx.federated.demo import demo_settings
from fedmef_fx.federated.methods.top_gradients import TopGradients
from fedmef_fx.models import digits_cnn


def federation(space: str, *, prune_marked: bool, strength: float, rounds: int, seed: int) -> History:
    """One run."""
    settings = demo_settings()
    config = settings.config.replace(
        adjustment_space=space,
        extrusion_strength=strength,
        adjustment_interval=2,
        adjustment_stop=rounds * 3 // 4,
        seed=seed,
    )
    torch.manual_seed(seed)
    train, test = load_digits(seed=seed)
    parts = dirichlet_partition(train.tensors[1], clients=10, alpha=0.5, seed=seed)
    clients = [torch.utils.data.Subset(train, part.tolist()) for part in parts]
    method = Method(name="fedmef", adjustment=TopGradients(prune_marked=prune_marked))
    return run(digits_cnn(), clients, config, rounds=rounds, training=settings.training, method=method, test=test)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--spaces", nargs="+", choices=["effective", "parameter"], default=["effective", "parameter"])
    parser.add_argument("--strength", type=float, default=0.02)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=machine())
    for name in ("space", "pruned", "accuracy", "per seed", "after adjustments", "loss at the end"):
        table.add_column(name, justify="right")
    for space in options.spaces:
        for prune_marked in (False, True):
            found = [
                federation(
                    space, prune_marked=prune_marked, strength=options.strength, rounds=options.rounds, seed=seed
                )
                for seed in range(options.seeds)
            ]
            accuracies = [history.test_accuracy or 0.0 for history in found]
            adjusted = [r.test_loss or 0.0 for history in found for r in history.rounds if r.adjusted]
            table.add_row(
                space,
                "marked" if prune_marked else "lowest",
                f"{statistics.median(accuracies):.4f}",
                " ".join(f"{accuracy:.4f}" for accuracy in accuracies),
                f"{statistics.mean(adjusted):.4f}",
                f"{statistics.mean(history.rounds[-1].test_loss or 0.0 for history in found):.4f}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
