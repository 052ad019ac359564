"""Which learning rates hold for NSConv networks, with and without adaptive gradient clipping.

    python benchmarks/learning_rates.py [--clippings 0 0.02 0.05 0.1] [--rates 0.02 0.05 ...]

Trains `digits_cnn` on scikit-learn's digits and, where FEDMEF_FX_DATA names a folder with CIFAR-10, the network of
`activation_accuracy.py` on the first images of its training set; density 0.1, gamma 0.9, batch 64, SGD with momentum
0.9, cosine schedule. Clipping 0 is none. Every cell is the worst test accuracy of all seeds, "-" where the loss of one
became infinite or NaN. A rate holds where that is within three points of the best cell of the table.
"""

import argparse
import math
import os
import time
from collections.abc import Callable

import torch
from _machine import machine
from activation_accuracy import network
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.data import load_cifar10, load_digits
from fedmef_fx.models import digits_cnn
from fedmef_fx.training.clipping import clip_gradients

BATCH = 64
MARGIN = 0.03

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training images and labels, test images and labels."""


def digits() -> Data:
    """All of scikit-learn's digits."""
    training, test = load_digits()
    return (*training.tensors, *test.tensors)


def cifar10(images: int) -> Data:
    """The first training images of CIFAR-10, and half as many of the test set."""
    training, test = load_cifar10()
    first = [
        data.batch(torch.arange(min(count, len(data)))) for data, count in ((training, images), (test, images // 2))
    ]
    return (*first[0], *first[1])


def accuracy_after(
    model: nn.Module, data: Data, *, rate: float, clipping: float, seed: int, epochs: int
) -> float | None:
    """Test accuracy after training; None if the loss did not stay finite."""
    images, labels, test_images, test_labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    order = torch.Generator().manual_seed(seed)
    steps, step = epochs * (len(images) // BATCH), 0
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order)[: steps // epochs * BATCH].split(BATCH):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if not loss.isfinite():
                return None
            loss.backward()
            if clipping:
                clip_gradients(model, clipping)
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        parts = zip(test_images.split(500), test_labels.split(500), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    return right / len(test_labels)


def worst(
    make: Callable[[], nn.Module], data: Data, *, seeds: int, rate: float, clipping: float, epochs: int
) -> float | None:
    """The least accuracy of all seeds, each with weights, masks and batches of its own; None if any run diverged."""
    found: list[float] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = transform(make(), Config(density=0.1, activation_sparsity=0.9, seed=seed)).train()
        reached = accuracy_after(model, data, rate=rate, clipping=clipping, seed=seed, epochs=epochs)
        if reached is None:
            return None
        found.append(reached)
    return min(found)


def main() -> None:
    """Print one table per network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clippings", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
    names = ("DIGITS", "CIFAR")
    parser.add_argument("--seeds", type=int, nargs=2, default=[2, 1], metavar=names)
    parser.add_argument("--epochs", type=int, nargs=2, default=[5, 2], metavar=names)
    parser.add_argument("--images", type=int, default=2000, help="training images of CIFAR-10")
    options = parser.parse_args()
    console = Console(width=120)
    console.print(machine())
    sets: list[tuple[str, Callable[[], nn.Module], Data]] = [("digits_cnn, digits", digits_cnn, digits())]
    if os.environ.get("FEDMEF_FX_DATA"):
        sets.append(("three blocks, CIFAR-10", network, cifar10(options.images)))
    for (name, make, data), epochs, seeds in zip(sets, options.epochs, options.seeds, strict=False):
        start = time.perf_counter()
        cells = {
            clipping: {
                rate: worst(make, data, seeds=seeds, rate=rate, clipping=clipping, epochs=epochs)
                for rate in options.rates
            }
            for clipping in options.clippings
        }
        best = max(cell for row in cells.values() for cell in row.values() if cell is not None)
        seconds = time.perf_counter() - start
        table = Table(
            title=f"{name}: {len(data[0])} images, {epochs} epochs, worst of {seeds} seed(s), {seconds:.0f} s"
        )
        table.add_column("clipping", justify="right")
        for rate in options.rates:
            table.add_column(f"{rate:g}", justify="right")
        table.add_column(f"rates that hold (>= {best - MARGIN:.3f})")
        for clipping, row in cells.items():
            held = [f"{rate:g}" for rate, cell in row.items() if cell is not None and cell >= best - MARGIN]
            shown = ["-" if cell is None else f"{cell:.3f}" for cell in row.values()]
            table.add_row(f"{clipping:g}" if clipping else "none", *shown, ", ".join(held) or "none")
        console.print(table)


if __name__ == "__main__":
    main()
