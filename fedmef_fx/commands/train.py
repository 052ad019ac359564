"""`fedmef-fx train`: a federation in one process, on data that is at hand."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch.utils.data import Subset

import fedmef_fx
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
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import METHODS, History, LocalTraining, RoundRecord, run
from fedmef_fx.files.atomic import usable_folder
from fedmef_fx.models import REFERENCE_MODELS

__all__ = ["train"]


@command
@takes_config(training=True)
def train(  # noqa: PLR0913 -- one parameter per option of the command line
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="As for the other commands; default: digits_cnn, resnet18 for CIFAR-10.",
            autocompletion=lambda: list(REFERENCE_MODELS),
        ),
    ] = None,
    data: Annotated[Data, typer.Option(help="Data set.")] = Data.DIGITS,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where CIFAR-10's binary files are; default: FEDMEF_FX_DATA.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where history, checkpoints and model go.")] = Path(
        "fedmef-run"
    ),
    method: Annotated[
        str, typer.Option(help=f"One of {', '.join(METHODS)}.", autocompletion=lambda: list(METHODS))
    ] = "fedmef",
    rounds: Annotated[int, typer.Option(help="Number of rounds.")] = 20,
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 10,
    clients_per_round: Annotated[int | None, typer.Option(help="Clients drawn for each round; default: all.")] = None,
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration: small gives each client few classes.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Local epochs per round.")] = LocalTraining.epochs,
    batch_size: Annotated[int, typer.Option(help="Samples per batch.")] = LocalTraining.batch_size,
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", help="At the start.")
    ] = LocalTraining.learning_rate,
    schedule: Annotated[str, typer.Option(help="Learning rate over the rounds: constant or cosine.")] = "constant",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    resume: Annotated[
        bool,
        typer.Option("--resume/--restart", help="Continue an interrupted run of the same settings, or start over."),
    ] = True,
    keep_rounds: Annotated[
        bool, typer.Option("--keep-rounds", help="Keep a checkpoint of every round, for `fedmef-fx compare`.")
    ] = False,
    as_json: AsJson = False,
    config: Config,
) -> Result:
    """Train a model, federated and sparse; an interrupted run continues where it was.

    Writes history.json, model.safetensors (for `fedmef-fx export --checkpoint`) and the folder rounds to go on from.
    """
    training = LocalTraining(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,  # type: ignore[arg-type]  # LocalTraining checks it and names the choices
        learning_rate=learning_rate,
        round_schedule=schedule,  # type: ignore[arg-type]  # as above
    )
    network = build_model(model or DEFAULT_MODELS[data], seed=config.seed)
    train_set, test_set, labels = load_data(data, data_dir)
    check_fits(network, train_set, name=model or DEFAULT_MODELS[data], data=data)
    shares = dirichlet_partition(labels, clients=clients, alpha=alpha, seed=config.seed)
    usable_folder(output, error=ConfigError)
    played: list[RoundRecord] = []

    def tell(record: RoundRecord) -> None:
        played.append(record)
        bar.reach(record.round_index + 1, round_note(record))

    saved = output / "rounds"
    with progress_bar("rounds", steps=rounds) as bar, telling_how_to_go_on(saved, resume=resume):
        history = run(
            network,
            [Subset(train_set, share.tolist()) for share in shares],
            config,
            rounds=rounds,
            test=test_set,
            clients_per_round=clients_per_round,
            training=training,
            method=method,
            checkpoint_dir=saved,
            resume=resume,
            keep_rounds=keep_rounds,
            progress=tell,
            device=device_of(device),
        )
    history.save(output / "history.json")
    if history.model is not None:
        fedmef_fx.save(history.model, output / "model.safetensors")
    resumed = len(history.rounds) - len(played)
    return Result(_summary(history, output), lambda console: _show(console, history, output, resumed=resumed))


def _summary(history: History, output: Path) -> dict[str, Any]:
    last = history.rounds[-1]
    return {
        "path": str(output),
        "rounds": len(history.rounds),
        "test_accuracy": history.test_accuracy,
        "test_loss": last.test_loss,
        "density": last.density,
        "bytes_down": history.bytes_down,
        "bytes_up": history.bytes_up,
        "peak_saved_bytes": max(record.peak_saved_bytes for record in history.rounds),
        "seconds": history.seconds,
    }


def _show(console: Console, history: History, output: Path, *, resumed: int) -> None:
    if resumed:
        typer.echo(f"resumed: {resumed} of {len(history.rounds)} rounds were done before, see {output / 'rounds'}")
    typer.echo(str(history))
    console.print()
    files = [("history", "history.json"), ("model", "model.safetensors"), ("to go on from", "rounds")]
    rows = [(what, str(output / name)) for what, name in files]
    rows.append(("sent", f"{shown_bytes(history.bytes_down)} down, {shown_bytes(history.bytes_up)} up"))
    show_table(console, ("", ""), rows)
