"""One training step: bytes kept between forward and backward, and time, against masked-dense training with BatchNorm.

    python benchmarks/training_step.py [--models resnet18 mobilenet_v2] [--batch 64] [--runs 7]

The baseline is what FedDST, FedTiny and FedPruning do: the original model with its weights multiplied by their masks
after each step, so that it keeps no second copy of a weight. Both models have the same masks. Steps are interleaved;
the figure is the median of the ratios, with their quartiles.
"""

import argparse
import statistics
import time

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, masks, transform
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.models import REFERENCE_MODELS


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

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step; returns its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self._apply_masks()
        return time.perf_counter() - start

    def kept(self, x: Tensor, y: Tensor) -> int:
        """Bytes kept between forward and backward, parameters and the batch left out."""
        with SavedTensors(self.model, x, y) as saved:
            loss = F.cross_entropy(self.model(x), y)
        kept = saved.nbytes
        loss.backward()
        return kept


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    table = Table(title=f"batch {options.batch}, density 0.1, gamma 0.9; {machine()}")
    for column in (
        "model",
        "kept, baseline MB",
        "kept, ours MB",
        "ratio",
        "step, baseline s",
        "step, ours s",
        "ratio [q1, q3]",
    ):
        table.add_column(column, justify="right")
    for name in options.models:
        torch.manual_seed(0)
        model = REFERENCE_MODELS[name]()
        x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(0, 10, (options.batch,))
        ours = Trainer(transform(model, Config(density=0.1, activation_sparsity=0.9)))
        baseline = Trainer(model, masks(ours.model))
        for trainer in (baseline, ours):
            trainer.step(x, y)
        kept = [trainer.kept(x, y) for trainer in (baseline, ours)]
        times = [(baseline.step(x, y), ours.step(x, y)) for _ in range(options.runs)]
        ratios = [b / a for a, b in times]
        low, median, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            name,
            f"{kept[0] / 1e6:.1f}",
            f"{kept[1] / 1e6:.1f}",
            f"{kept[1] / kept[0]:.3f}",
            f"{statistics.median(a for a, _ in times):.2f}",
            f"{statistics.median(b for _, b in times):.2f}",
            f"{median:.2f} [{low:.2f}, {high:.2f}]",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
