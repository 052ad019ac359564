"""The demonstration's federation on scikit-learn's digits: accuracy, time and bytes, over several seeds.

    python benchmarks/digits_federation.py [--seeds 3] [--rounds]

10 clients, Dirichlet 0.5, FedMef at density 0.1 and gamma 0.9, digits_cnn; settings of `fedmef_fx.federated.demo`.
With --rounds the history of every seed is printed.
"""

import argparse
import statistics

from _machine import machine
from rich.console import Console
from rich.table import Table

from fedmef_fx.federated.demo import demo_settings, run_demo


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", action="store_true", help="print every round")
    options = parser.parse_args()

    console = Console()
    console.print(machine())
    console.print(str(demo_settings()))
    table = Table("seed", "rounds", "accuracy", "density", "seconds", "MB down", "MB up", "peak saved kB")
    accuracies, seconds = [], []
    for seed in range(options.seeds):
        history = run_demo(seed=seed).history
        if options.rounds:
            console.print(str(history))
        accuracies.append(history.test_accuracy or 0.0)
        seconds.append(history.seconds)
        table.add_row(
            str(seed),
            str(len(history.rounds)),
            f"{accuracies[-1]:.4f}",
            f"{history.rounds[-1].density:.4f}",
            f"{seconds[-1]:.1f}",
            f"{history.bytes_down / 1e6:.2f}",
            f"{history.bytes_up / 1e6:.2f}",
            f"{max(record.peak_saved_bytes for record in history.rounds) / 1e3:.1f}",
        )
    table.add_section()
    table.add_row("median", "", f"{statistics.median(accuracies):.4f}", "", f"{statistics.median(seconds):.1f}")
    table.add_row("range", "", f"{min(accuracies):.4f} to {max(accuracies):.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
