"""What an adjustment round takes of a client over an ordinary round with the same local steps: time and peak memory.

    python benchmarks/adjustment_round.py [--models resnet resnet18] [--methods fedmef] [--samples 320] [--repeats 3]

A client trains with the defaults of `Config` and `LocalTraining` on random images, once as an ordinary round asks for
it and once as an adjustment round does, with the k_l of the schedule's start: extrusion of the lowest weights in every
step, and growth candidates afterwards. Time is that of the processor, one thread; both rounds alternate, and the ratio
is the median of the pairs. The peak is that of all tensors alive (`fedmef_fx.measure`), from a round of its own.
`--repeats 0` measures peaks alone, for models whose rounds take long.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from _docs import fill
from _machine import machine
from methods import MODELS as SMALL_MODELS
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config, transform
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.federated import LocalTraining
from fedmef_fx.federated.local import train_locally
from fedmef_fx.federated.messages import RoundTask
from fedmef_fx.federated.methods import METHODS
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.models import REFERENCE_MODELS
from fedmef_fx.sparsity.schedule import adjustment_count
from fedmef_fx.training.adjustment import unit_sizes

MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    **SMALL_MODELS,
    **REFERENCE_MODELS,
}


class Client:
    """A model, its data, and the two rounds it can be asked for."""

    def __init__(self, model: str, method: str, training: LocalTraining, *, samples: int) -> None:
        torch.manual_seed(0)
        chosen = METHODS[method]
        self.start = transform(MODELS[model](), chosen.configure(Config()))
        self.training = training
        self.data = TensorDataset(torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,)))
        counts = {
            name: adjustment_count(active, rest, round_index=0, stop=10, rate=Config().adjustment_rate)
            for name, (active, rest) in unit_sizes(self.start).items()
        }
        self.tasks = {
            "ordinary": RoundTask(1, 10, report=chosen.policy.report),
            "adjustment": RoundTask(1, 10, counts=counts, report=chosen.policy.report),
        }

    def seconds(self, kind: str) -> float:
        """Processor time of a round."""
        model = copy.deepcopy(self.start)
        start = time.process_time()
        train_locally(model, self.data, self.training, task=self.tasks[kind])
        return time.process_time() - start

    def peak(self, kind: str) -> int:
        """The largest number of bytes of tensors alive in a round."""
        model = copy.deepcopy(self.start)
        with LiveBytes(model) as live:
            train_locally(model, self.data, self.training, task=self.tasks[kind])
        return live.peak


def timed(client: Client, repeats: int) -> tuple[str, str, str, str]:
    """Seconds of both rounds, the median of their ratios, and all of these."""
    client.seconds("adjustment")
    pairs = [(client.seconds("ordinary"), client.seconds("adjustment")) for _ in range(repeats)]
    ratios = [after / before for before, after in pairs]
    return (
        f"{statistics.median(before for before, _ in pairs):.2f} s",
        f"{statistics.median(after for _, after in pairs):.2f} s",
        f"{statistics.median(ratios):.3f}",
        " ".join(f"{ratio:.2f}" for ratio in ratios),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet", "mobilenet", "resnet18"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["fedmef"])
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--repeats", type=int, default=3, help="of the times; 0 for peaks alone")
    parser.add_argument("--epochs", type=int, default=LocalTraining().epochs)
    parser.add_argument("--batch", type=int, default=LocalTraining().batch_size)
    parser.add_argument("--docs", type=Path, help="page whose table is filled in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    training = LocalTraining(epochs=options.epochs, batch_size=options.batch)
    times = ("ordinary", "adjustment", "ratio", "each") if options.repeats else ()
    headings = ("model", "method", *times, "peak", "adjustment", "ratio")
    rows = []
    for model in options.models:
        for method in options.methods:
            client = Client(model, method, training, samples=options.samples)
            plain, adjusting = client.peak("ordinary"), client.peak("adjustment")
            peaks = (shown_bytes(plain), shown_bytes(adjusting), f"{adjusting / plain:.3f}")
            rows.append((model, method, *(timed(client, options.repeats) if options.repeats else ()), *peaks))
    table = Table(title=machine())
    for name in headings:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
    if options.docs is not None:
        text = "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *rows])
        setting = f"{options.samples} samples, {options.epochs} epochs in batches of {options.batch}."
        fill(options.docs, "adjustment round" if options.repeats else "client peak", f"{text}\n\n{setting} {machine()}")


if __name__ == "__main__":
    main()
