"""One training step: bytes kept between forward and backward, and time, against masked-dense training with BatchNorm.

    python benchmarks/training_step.py [--models resnet18 mobilenet_v2] [--batch 64 8] [--density 0.1] [--threads 1 2]

The baseline is what FedDST, FedTiny and FedPruning do: the original model with its weights multiplied by their masks
after each step, so that it keeps no second copy of a weight. Both models have the same masks. Steps are interleaved;
the figures are medians of the ratios, with their quartiles, of elapsed time and of the processor time of all threads.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, masks, transform
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.models import REFERENCE_MODELS


class Seconds(NamedTuple):
    """Of a step: elapsed, and of processor time."""

    elapsed: float
    used: float


class Trainer:
    """A model with its optimizer and, for the baseline, masks that are applied after each step."""

    def __init__(self, model: nn.Module, masks_after_step: dict[str, Tensor] | None = None) -> None:
        self.model = model.train()
        self.masks = {model.get_parameter(name): mask for name, mask in (masks_after_step or {}).items()}
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self._apply_masks()

    @torch.no_grad()
    def _apply_masks(self) -> None:
        for parameter, mask in self.masks.items():
            parameter.mul_(mask)

    def step(self, x: Tensor, y: Tensor) -> Seconds:
        """One step."""
        start = Seconds(time.perf_counter(), time.process_time())
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self._apply_masks()
        return Seconds(time.perf_counter() - start.elapsed, time.process_time() - start.used)

    def kept(self, x: Tensor, y: Tensor) -> int:
        """Bytes kept between forward and backward, parameters and the batch left out."""
        with SavedTensors(self.model, x, y) as saved:
            loss = F.cross_entropy(self.model(x), y)
        kept = saved.nbytes
        loss.backward()
        return kept


def row(name: str, batch: int, density: float, runs: int) -> list[str]:
    """The figures of a model."""
    torch.manual_seed(0)
    model = REFERENCE_MODELS[name]()
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    ours = Trainer(transform(model, Config(density=density)))
    baseline = Trainer(model, masks(ours.model))
    for trainer in (baseline, ours):
        trainer.step(x, y)
    kept = [trainer.kept(x, y) for trainer in (baseline, ours)]
    steps = [(baseline.step(x, y), ours.step(x, y)) for _ in range(runs)]
    elapsed = [b.elapsed / a.elapsed for a, b in steps]
    used = [b.used / a.used for a, b in steps]
    return [
        f"{name}, {batch}, {density:g}",
        f"{kept[0] / 1e6:.1f}",
        f"{kept[1] / 1e6:.1f}",
        f"{kept[1] / kept[0]:.3f}",
        f"{statistics.median(a.elapsed for a, _ in steps):.2f}",
        f"{statistics.median(b.elapsed for _, b in steps):.2f}",
        described(elapsed),
        described(used),
    ]


def described(ratios: list[float]) -> str:
    """Their median and quartiles."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Print a table for each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 8])
    parser.add_argument("--density", type=float, nargs="+", default=[0.1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        table = Table(title=f"2 bits, weights packed; {machine()}")
        for column in ("model, batch, density", "kept, baseline MB", "ours MB", "ratio"):
            table.add_column(column, justify="right")
        for column in ("step, baseline s", "ours s", "elapsed, ratio [q1, q3]", "processor, ratio [q1, q3]"):
            table.add_column(column, justify="right")
        for name in options.models:
            for batch in options.batch:
                for density in options.density:
                    table.add_row(*row(name, batch, density, options.runs))
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
