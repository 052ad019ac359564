"""What budget-aware extrusion is for: by how much pruning raises the loss, with it and without.

    python benchmarks/extrusion.py [--data digits cifar10] [--seeds 3] [--strengths 0 1e-4 1e-2 1e-1] [--epochs 8]

A federation (Dirichlet 0.5, density 0.1, gamma 0.9) trains for some rounds without adjustments. Then, from the same
weights, one adjustment round per strength lambda: clients train with extrusion, the server averages and prunes the k_l
lowest magnitudes of each layer (alpha = 0.4). The figure is the test loss right after this pruning minus right before
it, nothing grown yet; 0 stands for training without extrusion. "norm left" is ||theta_low|| of the marked weights after
the round, divided by that before it.

digits: digits_cnn, 10 clients. cifar10: 2,000 training and 2,000 test images, a small network, 3 clients, from the
directory that FEDMEF_FX_DATA names; left out when it is unset.
"""

import argparse
import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from fedmef_fx import Config, set_masks
from fedmef_fx.data import DATA_VARIABLE, dirichlet_partition, load_cifar10, load_digits
from fedmef_fx.federated import LocalTraining, RoundTask, run, train_locally
from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.evaluation import evaluate
from fedmef_fx.federated.state import ModelState, load_state, read_state
from fedmef_fx.models import digits_cnn
from fedmef_fx.sparse_model.parameters import masked_parameters
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.adjust import lowest_magnitude
from fedmef_fx.sparsity.schedule import adjustment_count

CLIENTS = {"digits": 10, "cifar10": 3}
BATCH_SIZE = {"digits": 32, "cifar10": 32}
ROUNDS = {"digits": 4, "cifar10": 12}
"""Before the adjustment: natural images take longer until there is something to lose."""
# Rates that hold with clipping.
RATE = {"digits": 0.4, "cifar10": 0.2}


def cifar_cnn() -> nn.Sequential:
    """Three Conv-BatchNorm-ReLU blocks with pooling, 32x32 to 4x4."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def problem(data: str, *, seed: int) -> tuple[nn.Module, list[Dataset[Any]], Dataset[Any]]:
    """Model, clients and test set."""
    torch.manual_seed(seed)
    train: TensorDataset
    test: TensorDataset
    if data == "digits":
        model: nn.Module = digits_cnn()
        train, test = load_digits(seed=seed)
    else:
        model = cifar_cnn()
        full_train, full_test = load_cifar10()
        train = TensorDataset(*full_train.batch(torch.randperm(len(full_train))[:2000]))
        test = TensorDataset(*full_test.batch(torch.arange(2000)))
    parts = dirichlet_partition(train.tensors[1], clients=CLIENTS[data], alpha=0.5, seed=seed)
    return model, [Subset(train, part.tolist()) for part in parts], test


def adjustment_counts(model: nn.Module) -> dict[str, int]:
    """k_l for the share alpha of each layer's active weights."""
    rate = transformation_of(model).config.adjustment_rate
    counts = {}
    for name, (_, mask) in masked_parameters(model).items():
        active = int(mask.sum())
        counts[name] = adjustment_count(active, mask.numel() - active, round_index=0, stop=1, rate=rate)
    return counts


def lowest(model: nn.Module, counts: dict[str, int]) -> dict[str, Tensor]:
    """Positions of the k_l lowest active weights of each layer."""
    parameters = masked_parameters(model)
    return {name: lowest_magnitude(e.parameter, e.mask, counts[name]) for name, e in parameters.items()}


def norm_at(model: nn.Module, positions: dict[str, Tensor]) -> float:
    """||theta||_2 at some positions of all layers."""
    parameters = masked_parameters(model)
    return float(
        torch.cat([torch.take(parameters[name].parameter.detach(), p) for name, p in positions.items()]).norm()
    )


def adjust_once(
    start: nn.Module, clients: Sequence[Dataset[Any]], test: Dataset[Any], training: LocalTraining, *, strength: float
) -> dict[str, float]:
    """One round of extrusion from given weights, averaging, and pruning; what it did to the loss."""
    server = copy.deepcopy(start)
    transformation = transformation_of(server)
    transformation.config = transformation.config.replace(extrusion_strength=strength)
    counts = adjustment_counts(server)
    marked = lowest(server, counts)
    marked_before = norm_at(server, marked)
    # The counts ask for extrusion; candidates from one batch, as they are not used here.
    task = RoundTask(1, 2, counts)
    updates = [
        train_locally(copy.deepcopy(server), data, training, task=task, client=c) for c, data in enumerate(clients)
    ]
    weights = [update.samples for update in updates]
    state = read_state(server, version=1)
    values = {name: weighted_average([u.values[name] for u in updates], weights) for name in state.values}
    dense = {name: weighted_average([u.dense[name] for u in updates], weights) for name in state.dense}
    load_state(server, ModelState(1, state.masks, values, dense))
    before, accuracy = evaluate(server, test)
    pruned = {name: mask.clone() for name, mask in state.masks.items()}
    for name, positions in lowest(server, counts).items():
        pruned[name].view(-1)[positions] = False
    marked_after = norm_at(server, marked)
    set_masks(server, pruned)
    after, accuracy_after = evaluate(server, test)
    return {
        "rise": after - before,
        "before": before,
        "drop": (accuracy or 0.0) - (accuracy_after or 0.0),
        "left": marked_after / marked_before,
    }


def measure(
    data: str,
    normalization: Literal["nsconv", "keep"],
    strengths: Sequence[float],
    *,
    seeds: int,
    epochs: int,
) -> dict[float, list[dict[str, float]]]:
    """Strength -> what `adjust_once` found, per seed."""
    results: dict[float, list[dict[str, float]]] = {strength: [] for strength in strengths}
    # The rates that hold for either kind of network.
    clipping, rate = (0.05, RATE[data]) if normalization == "nsconv" else (None, 0.05)
    # Within a round the rate decays: only then can the rate floor of extrusion act.
    training = LocalTraining(epochs=2, batch_size=BATCH_SIZE[data], learning_rate=rate, schedule="cosine")
    budget = dataclasses.replace(training, epochs=epochs, learning_rate=rate / 2, growth_batches=1)
    for seed in range(seeds):
        model, clients, test = problem(data, seed=seed)
        config = Config(normalization=normalization, gradient_clipping=clipping, adjustment_stop=0, seed=seed)
        warm = run(model, clients, config, rounds=ROUNDS[data], training=training).model
        assert warm is not None
        for strength in strengths:
            results[strength].append(adjust_once(warm, clients, test, budget, strength=strength))
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["digits", "cifar10"], default=["digits", "cifar10"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1e-4, 1e-2, 1e-1])
    parser.add_argument("--normalizations", nargs="+", choices=["nsconv", "keep"], default=["nsconv"])
    parser.add_argument("--epochs", type=int, default=8, help="local epochs of the adjustment round: the budget")
    options = parser.parse_args()

    # Networks this small gain nothing from more threads, and the figures then depend less on the machine.
    torch.set_num_threads(1)
    console = Console()
    console.print(machine())
    for data in options.data:
        if data == "cifar10" and not os.environ.get(DATA_VARIABLE):
            console.print(f"cifar10: left out, {DATA_VARIABLE} is unset")
            continue
        for normalization in options.normalizations:
            begin = time.perf_counter()
            found = measure(data, normalization, options.strengths, seeds=options.seeds, epochs=options.epochs)
            title = f"{data}, normalization={normalization}, {time.perf_counter() - begin:.0f} s"
            table = Table(
                "lambda", "loss before", "rise, median", "rise per seed", "accuracy drop", "norm left", title=title
            )
            for strength, rows in found.items():
                medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
                table.add_row(
                    f"{strength:g}",
                    f"{medians['before']:.4f}",
                    f"{medians['rise']:+.4f}",
                    " ".join(f"{row['rise']:+.4f}" for row in rows),
                    f"{medians['drop']:+.4f}",
                    f"{medians['left']:.3f}",
                )
            console.print(table)


if __name__ == "__main__":
    main()
