"""What budget-aware extrusion is for: by how much pruning raises the loss, in either space, with extrusion and without.

    python benchmarks/extrusion.py [--seeds 3] [--sweep] [--strengths 1e-4 ... 10] [--log FILE] [--docs PAGE]

The network of `activation_accuracy.py` at density 0.1 trains on CIFAR-10 (folder: FEDMEF_FX_DATA). From the same
weights then starts one adjustment round per space (`Config.adjustment_space`), schedule of the learning rate within the
round and strength lambda; 0 stands for training without extrusion. After it the k_l lowest weights of each layer (alpha
= 0.4), by that space, are pruned, and nothing is grown. "rise" is the test loss right after this pruning minus right
before it, "marked" the same where those weights are pruned that were marked when the round began. "scale" is by how
much rows of NSConvs have grown in length, sqrt(s): the median over all and the largest. `--log` appends each run to a
file and takes those that it holds as done; `--sweep` runs a constant rate beside the cosine and every strength.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _docs import fill
from _machine import machine
from activation_accuracy import network
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, Extrusion, masks, set_masks, transform
from fedmef_fx.data import Cifar10, load_cifar10
from fedmef_fx.sparse_model.effective import effective_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.schedule import adjustment_count
from fedmef_fx.training.adjustment import lowest_units, unit_sizes
from fedmef_fx.training.clipping import clip_gradients

BATCH = 64
STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0)
Data = tuple[Cifar10, Cifar10]


class Round(NamedTuple):
    """What a row of the table is about."""

    space: str
    schedule: str
    strength: float


@torch.no_grad()
def test_loss(model: nn.Module, data: Cifar10, *, samples: int) -> float:
    """Mean loss on the first test images."""
    model.eval()
    total = 0.0
    for indices in torch.arange(samples).split(500):
        images, labels = data.batch(indices)
        total += F.cross_entropy(model(images), labels, reduction="sum").item()
    model.train()
    return total / samples


def train(model: nn.Module, optimizer: torch.optim.SGD, data: Cifar10, *, steps: int, order: torch.Generator) -> Any:
    """Clipped steps on random batches; yields the share of steps taken before each, for the caller's schedule."""
    batches = itertools.chain.from_iterable(
        torch.randperm(len(data), generator=order)[: len(data) // BATCH * BATCH].split(BATCH) for _ in itertools.count()
    )
    for step, indices in zip(range(steps), batches, strict=False):
        yield step / steps
        images, labels = data.batch(indices)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        clip_gradients(model, 0.05)
        optimizer.step()


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.SGD:
    """The optimizer of both stages."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def pruned(model: nn.Module, positions: dict[str, Tensor]) -> nn.Module:
    """A copy without the weights at some positions."""
    result, changed = copy.deepcopy(model), {name: mask.clone() for name, mask in masks(model).items()}
    for name, gone in positions.items():
        changed[name].view(-1)[gone] = False
    set_masks(result, changed)
    return result


def row_lengths(model: nn.Module) -> Tensor:
    """sqrt(s) of all rows of NSConvs."""
    parameters, lengths = effective_parameters(model), []
    for name, kernel in transformation_of(model).kernels.items():
        rows = kernel.form.rows(parameters[name].masked.dense())
        mask = kernel.form.rows(parameters[name].mask)
        mean = rows.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        lengths.append(torch.where(mask, rows - mean, 0.0).norm(dim=1))
    return torch.cat(lengths)


def in_space(model: nn.Module, space: str) -> nn.Module:
    """A copy that adjusts in a space."""
    result = copy.deepcopy(model)
    transformation = transformation_of(result)
    transformation.config = transformation.config.replace(adjustment_space=space)
    return result


def marked_in(model: nn.Module) -> dict[str, Tensor]:
    """theta_low of a round that starts now."""
    parameters, sizes = effective_parameters(model), unit_sizes(model)
    rate = transformation_of(model).config.adjustment_rate
    counts = {name: adjustment_count(*sizes[name], round_index=0, stop=1, rate=rate) for name in parameters}
    return lowest_units(model, parameters, counts.__getitem__)


def norm_at(model: nn.Module, positions: dict[str, Tensor]) -> float:
    """||theta_low|| of all layers, in the model's space."""
    parameters = effective_parameters(model)
    return float(torch.cat([parameters[name].at(places) for name, places in positions.items()]).norm())


def trained(model: nn.Module, data: Cifar10, name: Round, *, options: argparse.Namespace, seed: int) -> nn.Module:
    """The model after a round."""
    result = in_space(model, name.space)
    optimizer, order = optimizer_of(result, options.rate / 2), torch.Generator().manual_seed(1000 + seed)
    with Extrusion(result, optimizer, budget_steps=options.steps, strength=name.strength):
        for progress in train(result, optimizer, data, steps=options.steps, order=order):
            if name.schedule == "cosine":
                optimizer.param_groups[0]["lr"] = options.rate / 2 * (1 + math.cos(math.pi * progress)) / 2
    return result


def found_in(start: nn.Module, model: nn.Module, test: Cifar10, name: Round, *, samples: int) -> dict[str, Any]:
    """What pruning does to the loss after a round."""
    start, model = in_space(start, name.space), in_space(model, name.space)
    marked, growth = marked_in(start), row_lengths(model) / row_lengths(start).clamp_min(1e-12)
    loss = test_loss(model, test, samples=samples)
    after, after_marked = (test_loss(pruned(model, gone), test, samples=samples) for gone in (marked_in(model), marked))
    return {
        "before": loss,
        "rise": after - loss,
        "marked": after_marked - loss,
        "left": norm_at(model, marked) / norm_at(start, marked),
        "scale": [float(growth.median()), float(growth.max())],
    }


def runs(options: argparse.Namespace, data: Data) -> dict[Round, list[dict[str, Any]]]:
    """Every round, one result per seed; those of the log are not repeated."""
    settings = {key: getattr(options, key) for key in ("warm", "steps", "rate", "samples")}
    lines = options.log.read_text().splitlines() if options.log is not None and options.log.exists() else ()
    done = {tuple(entry["key"]): entry["result"] for entry in map(json.loads, lines) if entry["settings"] == settings}
    names = [Round(*parts) for parts in itertools.product(options.spaces, options.schedules, options.strengths)]
    for seed in range(options.seeds):
        missing = [name for name in names if (*name, seed) not in done]
        start = warmed(options, data[0], seed) if missing else None
        plain: dict[str, nn.Module] = {}  # without extrusion the space does not matter until something is pruned
        for name in missing:
            model = plain.get(name.schedule) if name.strength == 0 else None
            model = trained(start, data[0], name, options=options, seed=seed) if model is None else model
            if name.strength == 0:
                plain[name.schedule] = model
            done[*name, seed] = found_in(start, model, data[1], name, samples=options.samples)
            if options.log is not None:
                entry = {"key": [*name, seed], "settings": settings, "result": done[*name, seed]}
                with options.log.open("a") as log:
                    log.write(json.dumps(entry) + "\n")
    return {name: [done[*name, seed] for seed in range(options.seeds)] for name in names}


def warmed(options: argparse.Namespace, data: Cifar10, seed: int) -> nn.Module:
    """The network that the rounds start from."""
    torch.manual_seed(seed)
    config = Config(density=0.1, activation_sparsity=0.0, weight_storage="dense", seed=seed)
    model = transform(network(), config).train()
    order = torch.Generator().manual_seed(seed)
    for _ in train(model, optimizer_of(model, options.rate), data, steps=options.warm, order=order):
        pass
    return model


HEADINGS = ("space", "schedule", "lambda", "loss before", "rise", "rise per seed", "marked", "norm left", "scale")


def rows_of(results: dict[Round, list[dict[str, Any]]]) -> list[list[str]]:
    """A row per round: medians and all values."""
    found = []
    for name, rows in results.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in ("before", "rise", "marked", "left")}
        found.append(
            [
                name.space,
                name.schedule,
                f"{name.strength:g}",
                f"{middle['before']:.3f}",
                f"{middle['rise']:+.4f}",
                " ".join(f"{row['rise']:+.4f}" for row in rows),
                f"{middle['marked']:+.4f}",
                f"{middle['left']:.3f}",
                f"{statistics.median(row['scale'][0] for row in rows):.2f} {max(row['scale'][1] for row in rows):.1f}",
            ]
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--spaces", nargs="+", choices=["effective", "parameter"], default=["parameter", "effective"])
    parser.add_argument("--schedules", nargs="+", choices=["cosine", "constant"], default=["cosine"])
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--warm", type=int, default=600, help="steps before the round")
    parser.add_argument("--steps", type=int, default=312, help="steps of the round: the budget")
    parser.add_argument("--rate", type=float, default=0.2, help="before the round; in it the rate starts at half of it")
    parser.add_argument("--samples", type=int, default=5000, help="test images")
    parser.add_argument("--sweep", action="store_true", help="every strength, with a constant and a cosine rate")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--docs", type=Path, help="page whose table is filled in")
    options = parser.parse_args()
    if options.sweep:
        options.schedules, options.strengths = ["cosine", "constant"], STRENGTHS
    # Networks this small gain little from more threads, and the figures then depend less on the machine.
    torch.set_num_threads(1)
    rows = rows_of(runs(options, load_cifar10()))
    table = Table(title=machine())
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=160).print(table)
    if options.docs is not None:
        text = "\n".join(f"| {' | '.join(line)} |" for line in [HEADINGS, ["---"] * len(HEADINGS), *rows])
        setting = f"{options.seeds} seeds, {options.warm} steps before, {options.steps} in the round"
        fill(options.docs, "extrusion", f"{text}\n\n{setting}, {options.samples} test images. {machine()}")


if __name__ == "__main__":
    main()
