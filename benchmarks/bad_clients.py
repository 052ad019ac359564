"""Federations on digits: with bad clients, with many clients, and what goes over the wire.

    python benchmarks/bad_clients.py [--seeds 3] [--rounds 30] [--only WORD] [--many 1000] [--many-rounds 30]

1. Accuracy of 20 clients, Dirichlet 0.5, density 0.1: all sound; 10 send weights that are no numbers; 2 send their
   change times -10 or -1, averaged by weight, by trimmed mean (a tenth cut off at either end), by the mean around the
   median (the farthest tenth left out) and by a trimmed mean of updates that were mixed with their nearest neighbours.
   Beside them what the others reach when these 2 take no part. `--only median` runs the cases with this word and
   nothing else.
2. Time for messages (encoding, decoding, checks) over the time of the rounds.
3. ResNet18: bytes of a client and round, up and down, over active values and dense tensors, and over these and a bit
   per prunable weight, which is sent where a mask has changed. Adjustment rounds send growth candidates up, too.
4. 1,000 clients of which 20 are drawn for each round: resident memory after a few rounds and at the end.
"""

import argparse
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _machine import machine
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset, Subset, TensorDataset

import fedmef_fx
from fedmef_fx.data import dirichlet_partition, load_digits
from fedmef_fx.federated import (
    LocalTraining,
    MeanAroundMedian,
    NeighbourMixing,
    Strategy,
    TrimmedMean,
    client,
    run,
    server,
)
from fedmef_fx.federated.demo import demo_settings
from fedmef_fx.federated.local_round import LocalRound
from fedmef_fx.models import digits_cnn, resnet18
from fedmef_fx.sparse_model.parameters import masked_parameters


@dataclasses.dataclass(kw_only=True)
class Attack(Strategy):
    """Clients below a number send something else than what they trained.

    Attributes:
        attackers: How many.
        factor: What their change is multiplied by.
    """

    attackers: int = 0
    factor: float = 1.0

    def after_training(self, local: LocalRound) -> None:
        """Turn the weights of an attacker into others."""
        if local.client < self.attackers:
            started, masked = local.started(), masked_parameters(local.model)
            for name, weight in local.weights().items():
                value = started[name] + self.factor * (weight - started[name])
                if name in masked:
                    masked[name].write(value)
                else:
                    local.model.get_parameter(name).data.copy_(value)


def federation(clients: int, *, seed: int, alpha: float = 0.5) -> tuple[list[Dataset[Any]], Dataset[Any]]:
    """Data of clients, and the test set."""
    train, test = load_digits(seed=seed)
    if clients > 100:  # fewer samples than clients: each gets some at random
        draws = torch.Generator().manual_seed(seed)
        return [Subset(train, torch.randint(len(train), (16,), generator=draws).tolist()) for _ in range(clients)], test
    parts = dirichlet_partition(train.tensors[1], clients=clients, alpha=alpha, seed=seed)
    return [Subset(train, part.tolist()) for part in parts], test


def accuracy(strategy: Strategy, *, seed: int, rounds: int) -> tuple[float, int]:
    """Final accuracy, and how often a client was left out."""
    settings = demo_settings(seed=seed)
    clients, test = federation(20, seed=seed)
    torch.manual_seed(seed)
    history = run(
        digits_cnn(), clients, settings.config, rounds=rounds, test=test, training=settings.training, strategy=strategy
    )
    return history.test_accuracy or 0.0, len(history.failures)


def bad_clients(console: Console, seeds: int, rounds: int, only: str) -> None:
    """Print accuracies."""
    trimmed: dict[str, Any] = {"aggregator": TrimmedMean(0.1), "minimum": 10}
    around: dict[str, Any] = {"aggregator": MeanAroundMedian(0.1), "minimum": 10}
    mixed: dict[str, Any] = {"aggregator": NeighbourMixing(TrimmedMean(0.1), 0.1), "minimum": 10}
    cases: dict[str, Callable[[], Strategy]] = {
        "all sound": Attack,
        "2 of 20 send no numbers": lambda: Attack(attackers=2, factor=float("nan")),
        "10 of 20 send no numbers": lambda: Attack(attackers=10, factor=float("nan")),
        "2 of 20 times -10, mean": lambda: Attack(attackers=2, factor=-10.0),
        "2 of 20 times -10, trimmed mean": lambda: Attack(attackers=2, factor=-10.0, **trimmed),
        "2 of 20 times -10, mean around the median": lambda: Attack(attackers=2, factor=-10.0, **around),
        "2 of 20 times -1, mean around the median": lambda: Attack(attackers=2, factor=-1.0, **around),
        "2 of 20 times -10, mixed, trimmed mean": lambda: Attack(attackers=2, factor=-10.0, **mixed),
        "2 of 20 times -1, mixed, trimmed mean": lambda: Attack(attackers=2, factor=-1.0, **mixed),
        "all sound, mixed, trimmed mean": lambda: Attack(**mixed),
        "all sound, mean around the median": lambda: Attack(**around),
    }
    table = Table("clients", "accuracy, median", "all", "left out", title=f"20 clients, {rounds} rounds")
    for label, made in cases.items():
        if only not in label:
            continue
        results = [accuracy(made(), seed=seed, rounds=rounds) for seed in range(seeds)]
        shown = ", ".join(f"{value:.3f}" for value, _ in results)
        median = statistics.median(value for value, _ in results)
        table.add_row(label, f"{median:.3f}", shown, str(sum(count for _, count in results)))
    console.print(table)


@contextmanager
def timed(*places: tuple[Any, str]) -> Iterator[list[float]]:
    """A block in which the time in functions is added up."""
    spent = [0.0]
    before = [getattr(owner, name) for owner, name in places]

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.perf_counter() - start

        return call

    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, around(function))
    try:
        yield spent
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def wire(console: Console, density: float = 0.1) -> None:
    """Print bytes over the formulas, and the share of time that messages take."""
    settings = demo_settings(seed=0)
    clients, test = federation(10, seed=0)
    at_server, at_client = ("encode_broadcast", "decode_update"), ("decode_broadcast", "encode_update")
    codecs = [*((server, name) for name in at_server), *((client, name) for name in at_client)]
    with timed(*codecs) as spent:
        history = run(digits_cnn(), clients, settings.config, rounds=10, test=test, training=settings.training)
    console.print(f"messages took {spent[0] / history.seconds:.1%} of the rounds' time, digits")

    config = fedmef_fx.Config(density=density, adjustment_interval=2)
    few = TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4))
    training = LocalTraining(epochs=1, batch_size=4, learning_rate=1e-3)
    history = run(resnet18(), [few, few], config, rounds=5, training=training)
    model = fedmef_fx.transform(resnet18(), config.replace(weight_storage="dense"))
    masks = fedmef_fx.masks(model)
    weights = sum(mask.numel() for mask in masks.values())
    active = sum(int(mask.count_nonzero()) for mask in masks.values())
    dense = sum(p.nbytes for name, p in model.named_parameters() if name not in masks)
    title = f"ResNet18, density {density}: bytes of a client and round over active values and dense tensors"
    table = Table("round", "adjusted", "up", "down", "down, mask included in the formula", title=title)
    for record in history.rounds:
        up, down = record.bytes_up / len(record.clients), record.bytes_down / len(record.clients)
        formula = 4 * active + dense
        cells = f"{up / formula:.3f}", f"{down / formula:.3f}", f"{down / (formula + weights / 8):.3f}"
        table.add_row(str(record.round_index), "yes" if record.adjusted else "", *cells)
    console.print(table)


def many(console: Console, clients: int, rounds: int) -> None:
    """Print memory with many clients."""
    settings, sizes = demo_settings(seed=0), []
    data, test = federation(clients, seed=0)

    def note(record: Any) -> None:
        sizes.append((record.round_index, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    start = time.perf_counter()
    history = run(
        digits_cnn(),
        data,
        settings.config,
        rounds=rounds,
        test=test,
        training=settings.training,
        clients_per_round=20,
        progress=note,
    )
    seconds = time.perf_counter() - start
    early, late = sizes[min(4, len(sizes) - 1)][1], sizes[-1][1]
    console.print(
        f"{clients} clients, 20 a round, {rounds} rounds: {seconds:.0f} s, accuracy {history.test_accuracy:.3f}, "
        f"highest resident memory {early:.0f} MiB after 5 rounds, {late:.0f} MiB at the end ({late / early:.3f})"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--many-rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    console.print(machine())
    if not options.only:
        wire(console)
        many(console, options.many, options.many_rounds)
    bad_clients(console, options.seeds, options.rounds, options.only)


if __name__ == "__main__":
    main()
