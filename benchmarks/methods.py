"""FedMef against its rivals on CIFAR-10: the same clients, seeds and budget for every method.

    python benchmarks/methods.py --log FILE [--minutes 180] [--cells resnet-0.1 resnet-0.05 mobilenet-0.1] [--seeds 3]
        [--methods ...] [--shares] [--intervals 3 5 10 20] [--docs docs/methods.md]

10,000 images of the folder that FEDMEF_FX_DATA names, 10 clients, Dirichlet 0.5, 40 rounds of one local epoch in
batches of 32, a small ResNet or a small MobileNetV2 whose first convolution has stride 2, so that a cell takes minutes
of one core; "wide" is the ResNet with twice the channels, which FedMef trains in the memory that the others take for
the small one. Rows: every method of `federated.METHODS` (FedMef with this project's defaults), and FedMef as published
(`Config.paper()`). --shares runs FedMef with one part at a time as published instead: parameter space, extrusion,
activations, BatchNorm. --intervals runs FedMef, FedDST and FedRTS at several Delta_R instead.

Finished cells are lines of the file --log: what is there is not run again, an interrupted cell goes on where it was.
No cell is started or continued after --minutes (0 only prints), and those that were not run are listed. A process uses
one thread; start the same command once more to use another core, the two share the cells.

Weights are stored dense while training, which is faster for networks this small and the same up to rounding. FedRTS'
published table shares methods and density with this one, not the setting: there ResNet18, 100 clients of which 10 take
part, 500 rounds of 5 epochs.
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
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fedmef_fx import Config
from fedmef_fx.data import dirichlet_partition, load_cifar10
from fedmef_fx.federated import METHODS, Contender, LocalTraining

CELLS: Final = ("resnet-0.1", "resnet-0.05", "mobilenet-0.1", "wide-0.1")


def _unit(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class _Residual(nn.Module):
    """Layers next to a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, layers: list[nn.Module], shortcut: list[nn.Module]) -> None:
        super().__init__()
        self.layers, self.shortcut = nn.Sequential(*layers), nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        out: Tensor = self.layers(x) + self.shortcut(x)
        return out


def small_resnet(width: int = 16) -> nn.Sequential:
    """ResNet-6: 16 channels at 16x16, then a block of 32 at 8x8 and one of 64 at 4x4; 73,370 parameters."""
    layers: list[nn.Module] = [*_unit(3, width, 3, stride=2), nn.ReLU()]
    for inputs, outputs in ((width, 2 * width), (2 * width, 4 * width)):
        block = [*_unit(inputs, outputs, 3, stride=2), nn.ReLU(), *_unit(outputs, outputs, 3)]
        layers += [_Residual(block, _unit(inputs, outputs, 1, stride=2)), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def wide_resnet() -> nn.Sequential:
    """`small_resnet` with twice the channels; 290,090 parameters."""
    return small_resnet(32)


def small_mobilenet() -> nn.Sequential:
    """MobileNetV2 with five inverted residuals, expansion 4; 43,482 parameters."""
    layers: list[nn.Module] = [*_unit(3, 16, 3, stride=2), nn.ReLU6()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 40, 2), (40, 40, 1)):
        width = 4 * inputs
        block = [*_unit(inputs, width, 1), nn.ReLU6()]
        block += [*_unit(width, width, 3, stride=stride, groups=width), nn.ReLU6(), *_unit(width, outputs, 1)]
        layers.append(_Residual(block, []) if stride == 1 else nn.Sequential(*block))
    layers += [*_unit(40, 160, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10))


MODELS: Final[dict[str, Callable[[], nn.Module]]] = {
    "resnet": small_resnet,
    "mobilenet": small_mobilenet,
    "wide": wide_resnet,
}


def rivals(methods: Sequence[str], *, density: float, interval: int) -> list[Contender]:
    """Rows of the headline table."""
    own = Config(density=density, adjustment_interval=interval, weight_storage="dense")
    found = [Contender(label=name, method=name, config=own) for name in methods]
    if "fedmef" in methods:
        found.append(Contender(label="fedmef as published", config=Config.paper(density=density)))
    return found


def shares(*, density: float, interval: int) -> list[Contender]:
    """FedMef with one part changed at a time, or several at once as published."""
    own = Config(density=density, adjustment_interval=interval, weight_storage="dense")
    parts: dict[str, dict[str, Any]] = {
        "default": {},
        "parameter space": {"adjustment_space": "parameter"},
        "no extrusion": {"extrusion_strength": 0.0},
        "no adjustment": {"adjustment_stop": 0},
        "top-k activations": {"activation_sparsity": 0.9, "activation_bits": None},
        "exact activations": {"activation_sparsity": 0.0, "activation_bits": None},
        "BatchNorm": {"normalization": "keep"},
        "statistics over all weights": {"nsconv_statistics": "all"},
        "dense output layer": {"output_layer": "dense"},
    }
    found = [Contender(label=f"fedmef, {part}", config=own.replace(**change)) for part, change in parts.items()]
    return [*found, Contender(label="fedmef as published", config=Config.paper(density=density))]


def by_interval(intervals: Sequence[int], *, density: float) -> list[Contender]:
    """FedMef, FedDST and FedRTS at several Delta_R."""
    return [
        Contender(
            label=f"{name}, every {interval}",
            method=name,
            config=Config(density=density, adjustment_interval=interval, weight_storage="dense"),
        )
        for interval in intervals
        for name in ("fedmef", "feddst", "fedrts")
    ]


def rows_of(options: argparse.Namespace, density: float) -> tuple[str, list[Contender]]:
    """What a table is about, and its rows."""
    if options.intervals:
        return "intervals", by_interval(options.intervals, density=density)
    if options.shares:
        return "parts", shares(density=density, interval=options.interval)
    return "methods", rivals(options.methods, density=density, interval=options.interval)


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, required=True, help="file of finished cells")
    parser.add_argument("--docs", type=Path, help="page whose tables are filled in")
    parser.add_argument("--curves", type=Path, help="folder for images of accuracy by rounds and bytes")
    parser.add_argument("--minutes", type=float, default=180.0, help="after which no cell is started or continued")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=2_000)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--interval", type=int, default=Config().adjustment_interval, help="Delta_R")
    parser.add_argument("--shares", action="store_true", help="instead: FedMef with one part changed at a time")
    parser.add_argument("--intervals", type=int, nargs="+", help="instead: three methods at these Delta_R")
    return parser.parse_args()


def main() -> None:
    """Run and print."""
    options = arguments()
    torch.set_num_threads(1)
    console = Console()
    console.print(machine())
    until = time.monotonic() + 60 * options.minutes
    train, full_test = load_cifar10()
    test = Subset(full_test, list(range(min(options.test_images, len(full_test)))))
    count = min(options.images, len(train))

    def clients(seed: int) -> Sequence[Dataset[Any]]:
        parts = dirichlet_partition(train.labels[:count], clients=options.clients, alpha=0.5, seed=seed, min_samples=8)
        return [Subset(train, part.tolist()) for part in parts]

    training = LocalTraining(
        epochs=options.epochs,
        batch_size=32,
        learning_rate=options.rate,
        round_schedule="cosine",
        weight_storage="dense",
    )
    data = f"CIFAR-10, {count} images, {options.clients} clients, Dirichlet 0.5, {len(test)} test images"
    for cell in options.cells:
        name, density = cell.split("-")
        subject, rows = rows_of(options, float(density))
        problem = Problem(
            title=f"{subject} {cell}",
            model=MODELS[name],
            clients=clients,
            test=test,
            config=Config(),
            training=training,
            rounds=options.rounds,
            data=data,
        )
        curves = None if options.curves is None else options.curves / f"{subject}-{cell.replace('.', '-')}.png"
        run_cells(
            problem,
            rows,
            range(options.seeds),
            log=options.log,
            until=until,
            console=console,
            docs=options.docs,
            curves=curves,
        )


if __name__ == "__main__":
    main()
