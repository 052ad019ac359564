"""Transformers at batch 8: bytes of a training step against dense training, and a short training run.

    python benchmarks/transformers.py [--optimizer adamw] [--train] [--plot curves.png]

"held": kept between forward and backward. "live peak": the largest sum of all tensors during forward, backward and
optimizer step, with weights, masks, gradients and optimizer state, after a first step that makes the latter. Ours:
density 0.1, gamma 0.9, 8-bit codecs; with weights stored dense, and packed where this version can.

`--train` trains four of each: dense, masked dense (the same masks, everything kept exact), ours, and ours in 4 bits.
The vision transformer sees scikit-learn's digits as patches, the language model the bytes of this project's own text.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, transform
from fedmef_fx.data import load_digits
from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.live import LiveBytes
from fedmef_fx.measure.meter import SavedTensors
from fedmef_fx.models import gpt2_bytes, vit_tiny

ROOT = Path(__file__).resolve().parent.parent
OURS = Config(density=0.1, activation_sparsity=0.9, saved_precision="int8", weight_storage="dense")
FOUR_BITS = Config(density=0.1, activation_bits=4, saved_precision="int4", weight_storage="dense")
MASKED = Config(density=0.1, activation_sparsity=0.0, weight_storage="dense")


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy, over the classes in the last dimension."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, one parameter at a time: `foreach` would double its transients."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=False)
    return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """What a step takes."""

    held: int
    peak: int


def measure(model: nn.Module, x: Tensor, y: Tensor, *, optimizer: str) -> Bytes:
    """Two steps; the second is measured, when the optimizer has its state."""
    model.train()
    update = optimizer_of(optimizer, model)
    with LiveBytes(model, x, y) as live:
        held = 0
        for _ in range(2):
            live.reset_peak()
            with SavedTensors(model, x, y) as saved:
                loss = loss_of(model, x, y)
            held = saved.nbytes
            loss.backward()
            update.step()
            update.zero_grad()
            del loss
    return Bytes(held, live.peak)


def variants() -> Iterator[tuple[str, Config | None]]:
    """The compared models by name; None is the dense original."""
    yield "dense", None
    yield "masked dense", MASKED
    yield "ours, exact", OURS.replace(saved_precision="exact")
    yield "ours", OURS
    yield "ours, 4 bits", FOUR_BITS
    try:
        yield "ours, packed weights", OURS.replace(weight_storage="packed")
        yield "ours, 4 bits, packed weights", FOUR_BITS.replace(weight_storage="packed")
    except ConfigError:
        return


def memory_table(optimizer: str) -> Table:
    """Bytes of both models and all variants."""
    table = Table(title=f"batch 8, float32, {optimizer}; {machine()}")
    for column in ("model", "variant", "held MB", "held / dense", "live peak MB", "peak / dense"):
        table.add_column(column, justify="right" if "MB" in column or "/" in column else "left")
    tokens = torch.randint(256, (8, 129))
    cases: list[tuple[str, Callable[[], nn.Module], Tensor, Tensor]] = [
        ("vit_tiny", vit_tiny, torch.randn(8, 3, 32, 32), torch.randint(10, (8,))),
        ("gpt2_bytes", gpt2_bytes, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()),
    ]
    for name, build, x, y in cases:
        torch.manual_seed(0)
        model = build()
        dense: Bytes | None = None
        for label, config in variants():
            taken = measure(build() if config is None else transform(model, config), x, y, optimizer=optimizer)
            dense = dense or taken
            table.add_row(
                name,
                label,
                f"{taken.held / 1e6:.1f}",
                f"{taken.held / dense.held:.3f}",
                f"{taken.peak / 1e6:.1f}",
                f"{taken.peak / dense.peak:.3f}",
            )
    return table


Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


def digit_batches() -> Batches:
    """Digits in batches of 64, in an order that a seed fixes."""
    images, targets = load_digits()[0].tensors

    def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            chosen = torch.randint(len(targets), (64,), generator=generator)
            yield images[chosen], targets[chosen]

    return batches


def text_batches() -> Batches:
    """Windows of 64 bytes from the project's Markdown and Python files."""
    paths = sorted(path for kind in ("*.md", "*.py") for path in ROOT.rglob(kind) if ".venv" not in path.parts)
    text = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)

    def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            starts = torch.randint(len(text) - 65, (16,), generator=generator)
            windows = torch.stack([text[start : start + 65] for start in starts.tolist()]).long()
            yield windows[:, :-1], windows[:, 1:]

    return batches


def train(model: nn.Module, batches: Batches, steps: int) -> tuple[list[float], float]:
    """Losses of each step, and seconds per step."""
    model.train()
    update = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, start = [], time.perf_counter()
    for x, y in batches(steps):
        update.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - start) / steps


def training(steps: int) -> tuple[Table, dict[str, dict[str, list[float]]]]:
    """Train everything; the table shows the mean loss over the last tenth of the steps."""
    table = Table(title=f"{steps} steps of AdamW; loss, mean of each tenth of the run")
    for column in ("model", "variant", "first", "middle", "last", "seconds per step"):
        table.add_column(column, justify="left" if column in ("model", "variant") else "right")
    digits = {"image_size": 8, "patch_size": 2, "in_channels": 1, "dim": 64, "depth": 4, "heads": 4}
    cases: list[tuple[str, Callable[[], nn.Module], Batches]] = [
        ("ViT on digits", lambda: vit_tiny(**digits), digit_batches()),
        ("GPT-2 on text", lambda: gpt2_bytes(context=64, dim=128, depth=3, heads=4), text_batches()),
    ]
    curves: dict[str, dict[str, list[float]]] = {}
    for name, build, batches in cases:
        torch.manual_seed(0)
        model = build()
        for label, config in (("dense", None), ("masked dense", MASKED), ("ours", OURS), ("ours, 4 bits", FOUR_BITS)):
            torch.manual_seed(0)
            losses, seconds = train(build() if config is None else transform(model, config), batches, steps)
            curves.setdefault(name, {})[label] = losses
            tenth = max(steps // 10, 1)
            thirds = (losses[:tenth], losses[steps // 2 : steps // 2 + tenth], losses[-tenth:])
            table.add_row(name, label, *(f"{statistics.fmean(part):.3f}" for part in thirds), f"{seconds:.3f}")
    return table, curves


def plot(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The loss curves of each model in one panel, smoothed over 10 steps."""
    import matplotlib as mpl  # noqa: PLC0415 -- only where a plot is asked for

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.5), layout="constrained")
    for axis, (name, lines) in zip(axes, curves.items(), strict=True):
        for label, losses in lines.items():
            axis.plot([statistics.fmean(losses[max(i - 9, 0) : i + 1]) for i in range(len(losses))], label=label)
        axis.set(title=name, xlabel="step", ylabel="training loss")
        axis.legend()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="adamw")
    parser.add_argument("--train", action="store_true", help="train as well, about three minutes on one core")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write the loss curves as PNG or SVG")
    options = parser.parse_args()
    console = Console()
    console.print(memory_table(options.optimizer))
    if options.train or options.plot:
        table, curves = training(options.steps)
        console.print(table)
        if options.plot:
            plot(curves, options.plot)


if __name__ == "__main__":
    main()
