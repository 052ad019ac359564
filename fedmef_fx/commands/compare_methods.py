"""`fedmef-fx compare-methods`: several federated methods on the same clients, seeds and budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch.utils.data import Dataset, Subset

from fedmef_fx.commands.arguments import build_model
from fedmef_fx.commands.command import AsJson, Result, command, progress_bar
from fedmef_fx.commands.config_options import takes_config
from fedmef_fx.commands.tables import show_table
from fedmef_fx.commands.training_data import (
    DEFAULT_MODELS,
    Data,
    check_fits,
    device_of,
    load_data,
    round_note,
    telling_how_to_go_on,
)
from fedmef_fx.config import Config
from fedmef_fx.data import dirichlet_partition
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import METHODS, LocalTraining, MethodComparison, RoundRecord
from fedmef_fx.federated import compare_methods as run_comparison
from fedmef_fx.files.atomic import usable_folder

__all__ = ["compare_methods"]

_TABLES = ("table.md", "rounds.csv", "runs.json")


@command
@takes_config(training=True)
def compare_methods(  # noqa: PLR0913 -- one parameter per option of the command line
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="As for the other commands; default: digits_cnn, resnet18 for CIFAR-10."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"To compare; may be repeated. Default: all of {', '.join(METHODS)}."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per method, from --seed on.")] = 1,
    data: Annotated[Data, typer.Option(help="Data set.")] = Data.DIGITS,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where CIFAR-10's binary files are; default: FEDMEF_FX_DATA.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where tables, curves and finished cells go.")] = Path(
        "fedmef-comparison"
    ),
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 20,
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 10,
    clients_per_round: Annotated[int | None, typer.Option(help="Clients drawn for each round; default: all.")] = None,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration: small gives each client few classes.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Local epochs per round.")] = LocalTraining.epochs,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = LocalTraining.batch_size,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="At the start.")
    ] = LocalTraining.learning_rate,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Continue an interrupted comparison, or start over.")
    ] = True,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Compare methods: the same clients, seeds and rounds for each; an interrupted comparison goes on where it was.

    Writes table.md, rounds.csv, runs.json, curves.png where matplotlib is installed, and a folder for each cell.
    """
    name = model or DEFAULT_MODELS[data]
    train_set, test_set, labels = load_data(data, data_dir)
    check_fits(build_model(name, seed=config.seed), train_set, name=name, data=data)

    def partition(seed: int) -> Sequence[Dataset[Any]]:
        shares = dirichlet_partition(labels, clients=clients, alpha=alpha, seed=seed)
        return [Subset(train_set, share.tolist()) for share in shares]

    chosen = list(method or METHODS)
    usable_folder(output, error=ConfigError)
    with progress_bar("rounds", steps=rounds * seeds * len(chosen)) as bar, telling_how_to_go_on(output, resume=resume):
        done = 0

        def tell(label: str, seed: int, record: RoundRecord) -> None:
            nonlocal done
            done += 1
            bar.reach(done, f"{label}, seed {seed}: {round_note(record)}")

        found = run_comparison(
            lambda: build_model(name, seed=torch.initial_seed()),  # that of the cell
            partition,
            chosen,
            config,
            rounds=rounds,
            seeds=range(config.seed, config.seed + seeds),
            test=test_set,
            clients_per_round=clients_per_round,
            training=LocalTraining(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate),
            directory=output / "cells",
            resume=resume,
            progress=tell,
            device=device_of(device),
        )
    files = _write(found, output)
    return Result(found.to_json(), lambda console: _show(console, found, files))


def _write(found: MethodComparison, output: Path) -> list[Path]:
    """All files; curves only where matplotlib is installed."""
    files = [output / name for name in _TABLES]
    for file in files:
        found.save(file)
    try:
        found.plot(output / "curves.png")
    except ConfigError as error:
        if "matplotlib" not in str(error):
            raise
        return files
    return [*files, output / "curves.png"]


def _show(console: Console, found: MethodComparison, files: Sequence[Path]) -> None:
    headings, rows = found.cells()
    show_table(console, headings, rows, numbers=frozenset(range(1, len(headings))))
    for note in found.notes():
        typer.echo(note)
    console.print()
    show_table(console, ("written", ""), [(file.stem, str(file)) for file in files])
