"""What keeping less of activations costs in accuracy: the same NSConv network, trained in several ways on CIFAR-10.

    python benchmarks/activation_accuracy.py [--codes exact gamma=0.9 bits=2] [--seeds 5] [--epochs 8] [--log FILE]
    python benchmarks/activation_accuracy.py --network resnet18-w16 --epochs 10 --seeds 3 [--device cuda]
    python benchmarks/activation_accuracy.py --gradients

Three Conv-BatchNorm-ReLU blocks (32, 64, 128 channels), a ResNet18 of 16 to 128 channels or the small MobileNetV2 of
`methods.py`, made sparse and normalised by `transform`; batch 64, SGD with momentum, cosine schedule, adaptive gradient
clipping, random flips. A seed fixes weights, masks and batches, so that
the runs of one seed differ in the code only. Training and test images come from the folder that FEDMEF_FX_DATA names.

A code is `exact`, or options of `Config` joined by commas: `gamma` (activation_sparsity), `bits`, `block`, `levels`,
`rounding` (activation_...), `dtype` (packed_dtype). `--log` appends each run to a file, and takes those that it holds
as done: an interrupted benchmark goes on where it was. `--gradients` trains one network exactly and measures, with its
weights, bytes per element and the relative error of the weight gradients of one batch.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _machine import machine
from methods import small_mobilenet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.data import Cifar10, load_cifar10
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.models.convolutional import ResNet, _BasicBlock
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.training.clipping import clip_gradients

BATCH = 64
FIELDS = {
    "gamma": "activation_sparsity",
    "bits": "activation_bits",
    "block": "activation_block",
    "levels": "activation_levels",
    "rounding": "activation_rounding",
    "dtype": "packed_dtype",
}
GRADIENT_CODES = (
    *(f"gamma={gamma}" for gamma in (0.5, 0.8, 0.9)),
    "gamma=0.9,dtype=bfloat16",
    *(f"gamma={gamma},bits={bits}" for gamma in (0.5, 0.9) for bits in (2, 4)),
    *(f"bits={bits},rounding={rounding}" for bits in (1, 2, 3, 4, 8) for rounding in ("stochastic", "nearest")),
    *(f"bits={bits},block=64" for bits in (1, 2, 3, 4)),
    *(f"bits={bits},rounding=nearest,levels=centroids" for bits in (1, 2, 3, 4)),
)


def blocks() -> nn.Sequential:
    """32x32 images to 10 classes in three blocks and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def resnet18_w16() -> nn.Module:
    """ResNet18 for small images with a quarter of the channels: 16 to 128."""
    return ResNet(_BasicBlock, (2, 2, 2, 2), num_classes=10, in_channels=3, small_images=True, width=16)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "blocks": blocks,
    "resnet18-w16": resnet18_w16,
    "mobilenet": small_mobilenet,
}


def config_of(code: str, *, density: float, seed: int) -> Config:
    """The configuration of a code; see the module docstring."""
    fields: dict[str, Any] = {"activation_sparsity": 0.0}
    for part in () if code == "exact" else code.split(","):
        name, _, value = part.partition("=")
        fields[FIELDS[name]] = float(value) if name == "gamma" else int(value) if name in ("bits", "block") else value
    return Config(density=density, seed=seed, **fields)


def train(data: Cifar10, config: Config, options: argparse.Namespace) -> nn.Module:
    """One trained model."""
    seed, epochs, rate = config.seed, options.epochs, options.rate
    torch.manual_seed(seed)
    model = transform(NETWORKS[options.network](), config).to(options.device).train()
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
            images, labels = images.to(options.device), labels.to(options.device)
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
    device = next(model.parameters()).device
    correct = 0
    for indices in torch.arange(len(data)).split(500):
        images, labels = data.batch(indices)
        correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return correct / len(data)


def _seeds(options: argparse.Namespace) -> range:
    return range(options.first_seed, options.first_seed + options.seeds)


def runs(options: argparse.Namespace, data: tuple[Cifar10, Cifar10]) -> dict[tuple[str, int], dict[str, Any]]:
    """Every run, by code and seed: accuracy and seconds; those of the log are not repeated."""
    settings = {name: getattr(options, name) for name in ("network", "device", "epochs", "density", "rate")}
    done: dict[tuple[str, int], dict[str, Any]] = {}
    lines = options.log.read_text().splitlines() if options.log is not None and options.log.exists() else ()
    for entry in map(json.loads, lines):
        if all(entry[name] == value for name, value in settings.items()):
            done[entry["code"], entry["seed"]] = entry
    for seed in _seeds(options):
        for code in options.codes:
            if (code, seed) in done:
                continue
            start = time.perf_counter()
            config = config_of(code, density=options.density, seed=seed)
            model = train(data[0], config, options)
            result = {"code": code, "seed": seed, **settings, "accuracy": accuracy(model, data[1])}
            done[code, seed] = {**result, "seconds": time.perf_counter() - start}
            if options.log is not None:
                with options.log.open("a") as file:
                    file.write(json.dumps(done[code, seed]) + "\n")
    return done


def accuracies(options: argparse.Namespace, data: tuple[Cifar10, Cifar10]) -> Table:
    """The accuracy of each code, seed by seed, and what it loses against the first one."""
    table = Table(
        title=f"{options.network}, {len(data[0])} training, {len(data[1])} test images, density {options.density:g}; "
        f"{options.device}; {machine()}"
    )
    for column in ("code", "accuracy per seed", "median", "against first row", "seconds a run"):
        table.add_column(column, justify="right")
    done, seeds = runs(options, data), _seeds(options)
    for code in options.codes:
        found = [done[code, seed]["accuracy"] for seed in seeds]
        points = [
            100 * (value - done[options.codes[0], seed]["accuracy"]) for value, seed in zip(found, seeds, strict=True)
        ]
        table.add_row(
            code,
            " ".join(f"{value:.3f}" for value in found),
            f"{statistics.median(found):.3f}",
            f"{statistics.mean(points):+.1f} points ({' '.join(f'{d:+.1f}' for d in points)})",
            f"{statistics.mean(done[code, seed]['seconds'] for seed in seeds):.0f}",
        )
    return table


def gradient_errors(options: argparse.Namespace, data: Cifar10) -> Table:
    """Bytes per element of what layers read, and the error of weight gradients, of each code."""
    table = Table(title=f"Weight gradients of one batch after {options.epochs} exact epochs; {machine()}")
    for column in ("code", "bytes per element", "relative error per layer", "mean"):
        table.add_column(column, justify="right")
    trained = train(data, config_of("exact", density=options.density, seed=0), options)
    exact, _ = _gradients(trained, "exact", data, options)
    for code in GRADIENT_CODES:
        found, nbytes = _gradients(trained, code, data, options)
        errors = [float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
        table.add_row(
            code,
            f"{nbytes:.3f}",
            " ".join(f"{error:.3f}" for error in errors),
            f"{statistics.mean(errors):.3f}",
        )
    return table


def _gradients(
    trained: nn.Module, code: str, data: Cifar10, options: argparse.Namespace
) -> tuple[dict[str, Tensor], float]:
    """Gradients of the weights whose layers read what is coded, and bytes per element of that."""
    model = transform(NETWORKS[options.network](), config_of(code, density=options.density, seed=0)).train()
    model.load_state_dict(trained.state_dict())
    images, labels = data.batch(torch.arange(BATCH))
    numels: list[int] = []
    for site in (module for module in model.modules() if isinstance(module, PackActivation)):
        site.register_forward_pre_hook(lambda _, args: numels.append(args[0].numel()))
    with SavedTensors(model, images) as saved:
        loss = F.cross_entropy(model(images), labels)
    kinds, elements = saved.by_kind(), max(sum(numels), 1)
    # Max pooling keeps a byte for each of its results, and ReLUs a bit for each of theirs, whatever the code.
    pooled = BATCH * (32 * 256 + 64 * 64 + 128 * 16)
    relus = BATCH * (32 * 1024 + 64 * 256 + 128 * 64) // 8
    own = kinds["packed values"] + kinds["8-bit"] + kinds["bitmap"] - pooled - relus
    loss.backward()  # type: ignore[no-untyped-call]
    _first, *others = masked_parameters(model).items()  # the first layer reads the images, which their caller holds
    weights = {name: masked.parameter for name, masked in others}
    return {n: p.grad for n, p in weights.items() if p.grad is not None}, own / elements


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--codes", nargs="+", default=["exact", "bits=2", "gamma=0.9", "bits=1,rounding=nearest,levels=centroids"]
    )
    parser.add_argument("--network", choices=sorted(NETWORKS), default="blocks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--gradients", action="store_true", help="errors of gradients instead of accuracies")
    options = parser.parse_args()
    if options.gradients and (options.network, options.device) != ("blocks", "cpu"):
        parser.error("--gradients is for the network 'blocks' on the CPU, whose kept bytes it counts")
    training, test = load_cifar10()
    table = gradient_errors(options, training) if options.gradients else accuracies(options, (training, test))
    Console().print(table)


if __name__ == "__main__":
    main()
