"""What activation pruning costs in accuracy: the same NSConv network, trained with and without it on CIFAR-10.

    python benchmarks/activation_accuracy.py [--gammas 0 0.8 0.9] [--seeds 3] [--epochs 10] [--packed-dtype bfloat16]

Three Conv-BatchNorm-ReLU blocks (32, 64, 128 channels), made sparse and normalised by `transform`; batch 64, SGD with
momentum, cosine schedule, adaptive gradient clipping, random flips. A seed fixes weights, masks and batches, so that
the runs of one seed differ in gamma only. Training and test images come from the folder that FEDMEF_FX_DATA names.
"""

import argparse
import math
import statistics
import time

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.data import Cifar10, load_cifar10
from fedmef_fx.training.clipping import clip_gradients

BATCH = 64


def network() -> nn.Sequential:
    """32x32 images to 10 classes in three blocks and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def train(data: Cifar10, config: Config, *, epochs: int, rate: float) -> nn.Module:
    """One trained model."""
    seed = config.seed
    torch.manual_seed(seed)
    model = transform(network(), config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    order = torch.Generator().manual_seed(seed)
    steps, step = epochs * (len(data) // BATCH), 0
    for _ in range(epochs):
        for indices in torch.randperm(len(data), generator=order).split(BATCH):
            if len(indices) < BATCH:
                continue
            images, labels = data.batch(indices)
            flipped = torch.rand(len(images), generator=order) < 0.5
            images[flipped] = images[flipped].flip(-1)
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            clip_gradients(model, 0.05)
            optimizer.step()
            step += 1
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Cifar10) -> float:
    """Share of test images that are classified correctly."""
    model.eval()
    correct = 0
    for indices in torch.arange(len(data)).split(500):
        images, labels = data.batch(indices)
        correct += int((model(images).argmax(1) == labels).sum())
    return correct / len(data)


def kept_share(model: nn.Module) -> str:
    """Share of activations that the packing sites kept last, smallest to largest; "all" without sites."""
    shares = [m.estimator.kept for m in model.modules() if getattr(m, "estimator", None) is not None]
    known: list[float] = [share for share in shares if share is not None]
    return f"{min(known):.3f}-{max(known):.3f}" if known else "all"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.0, 0.8, 0.9])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--packed-dtype", choices=("same", "bfloat16", "float16"), default="same")
    options = parser.parse_args()
    training, test = load_cifar10()
    table = Table(title=f"{len(training)} training, {len(test)} test images, density {options.density:g}; {machine()}")
    for column in ("gamma", "kept", "accuracy per seed", "median", "against first row", "seconds a run"):
        table.add_column(column, justify="right")
    first: list[float] = []
    for gamma in options.gammas:
        start = time.perf_counter()
        found, kept = [], ""
        for seed in range(options.seeds):
            config = Config(
                density=options.density, activation_sparsity=gamma, packed_dtype=options.packed_dtype, seed=seed
            )
            model = train(training, config, epochs=options.epochs, rate=options.rate)
            found.append(accuracy(model, test))
            kept = kept_share(model)
        first = first or found
        differences = [100 * (a - b) for a, b in zip(found, first, strict=True)]
        table.add_row(
            f"{gamma:g}",
            kept,
            " ".join(f"{value:.3f}" for value in found),
            f"{statistics.median(found):.3f}",
            f"{statistics.mean(differences):+.1f} points ({' '.join(f'{d:+.1f}' for d in differences)})",
            f"{(time.perf_counter() - start) / options.seeds:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
