"""`run`: a whole federation on one machine. Every message goes through the wire format, so bytes are real."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.budgets import PLANS, planned_models
from fedmef_fx.federated.callbacks import OnRound
from fedmef_fx.federated.engines.choosing import Engine, check_engine, crew_at_work
from fedmef_fx.federated.engines.worker import Crew
from fedmef_fx.federated.history import History
from fedmef_fx.federated.local import LocalTraining
from fedmef_fx.federated.methods import Method, method_of
from fedmef_fx.federated.objective import LossFunction, Metric, Objective, objective_of
from fedmef_fx.federated.playing import Table, play
from fedmef_fx.federated.preparing import (
    check_clients,
    check_list,
    example_of,
    network_on,
    own_strategy,
    prepared,
    sample_of,
    settings_of,
    usable_directory,
)
from fedmef_fx.federated.progress import progress_of
from fedmef_fx.federated.resuming import resume as go_on
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.strategy import Strategy

__all__ = ["run"]


def run(  # noqa: PLR0913  # the options of a whole run, all but the data by keyword
    model: nn.Module,
    clients: Sequence[Any],
    config: Config | None = None,
    *,
    rounds: int,
    test: Any = None,
    clients_per_round: int | None = None,
    training: LocalTraining | Mapping[str, Any] | None = None,
    method: str | Method = "fedmef",
    strategy: Strategy | None = None,
    loss_fn: LossFunction | Objective = F.cross_entropy,
    collate_fn: Collate | None = None,
    metrics: Mapping[str, Metric] | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool | Literal["exact"] = True,
    keep_rounds: bool = False,
    progress: bool | Callable[[RoundRecord], None] | None = None,
    on_round: OnRound | Sequence[OnRound] = (),
    client_tests: Sequence[Any] | None = None,
    device: torch.device | str | None = None,
    engine: Engine = "inprocess",
    parallel: int | None = None,
) -> History:
    """Train a model on many clients' data, federated, sparse and with little memory per client.

    The result depends on the arguments only, `config.seed` among them, up to the arithmetic of the device.

    Args:
        model: A model, which is transformed as configuration and method say, or one that `fedmef_fx.transform` made.
            The caller's model never changes.
        clients: What each client has: a map-style data set, an IterableDataset, a DataLoader (with its own batches,
            order and workers), or `ClientData` and functions that open one of these when the client is chosen. Batches
            may be pairs (input, target), have several inputs, no target, or be dictionaries: see `Objective`. A single
            sample is enough, unless the model keeps a BatchNorm that needs more.
        config: The configuration; None for `Config()`, or for the one that a transformed model has.
        rounds: Number of rounds.
        test: Test set for the global model after every round.
        clients_per_round: How many clients are drawn for a round; None for all.
        training: How clients train: a `LocalTraining`, or its fields as a dictionary, `{"epochs": 1}`; None for
            `LocalTraining()`.
        method: A name in `METHODS`, or policies of your own.
        strategy: Who takes part, how many answers a round needs, what is late; None for `Strategy()`. It says how many
            clients are drawn, unless `clients_per_round` does.
        loss_fn: Mean loss of a batch of outputs and targets, or an `Objective`. The default takes the loss that the
            model computes itself, where it does, else cross-entropy of its logits.
        collate_fn: Makes a batch of items of a data set; None for what torch's loaders do.
        metrics: Name -> function of a batch's outputs and targets that gives a mean over its samples; evaluated with
            the test set, in `RoundRecord.metrics`.
        checkpoint_dir: Where the run is saved after every round; made if it is missing. One run at a time.
        resume: Continue from the checkpoint there, bit for bit as if the run had never been interrupted. It has to
            belong to the same settings, but for those that `fedmef_fx.federated.resuming` lists, such as a larger
            number of rounds; data, loss function and test set are not compared. False
            starts over; "exact" takes none but the same settings.
        keep_rounds: Keep a checkpoint of the model as it was before the first round and after each, as
            `round-00000.safetensors` and so on in `checkpoint_dir`, to compare rounds with
            `fedmef_fx.inspection.compare`; each takes as much space as the checkpoint.
        progress: Called with every finished round; True prints a line for each on stderr.
        on_round: Called with every finished round's record and the server, whose `model` is the new model: functions,
            or `Callback` objects such as `EarlyStopping` and `KeepBest`. One that gives True ends the run.
        client_tests: A test set per client, or None for a client without one; after every round that is evaluated the
            new model's loss and accuracy on each go into `RoundRecord.by_client`.
        device: Where to train and evaluate; None for where the model is.
        engine: `"inprocess"`: clients run on this machine.
        parallel: How many processes train clients at once, each with a copy of model and data sets; None for this
            process, one client after the other. The results are the same bits. A process that dies, or that
            `strategy.timeout_s` ends, is a failure of its client alone.

    Returns:
        The history; `history.model` is the final model, `history.failures` lists the clients that were left out.

    Raises:
        ConfigError: Arguments that cannot be used, or an empty client.
        RoundError: `Strategy.patience` rounds in a row, or all of them, in which too few clients gave a usable answer.
        CheckpointError: A checkpoint that is damaged or belongs to another run.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> clients = [TensorDataset(torch.randn(20, 8), torch.randint(2, (20,))) for _ in range(3)]
        >>> history = run(net, clients, Config(density=0.5), rounds=2)
        >>> [record.round_index for record in history.rounds]
        [0, 1]
    """
    check_list(clients)
    training = LocalTraining.of(training)
    progress = progress_of(progress, rounds=rounds)
    method = method_of(method)
    check_engine(engine, parallel)
    strategy = own_strategy(strategy, clients_per_round, clients=len(clients))
    objective = objective_of(loss_fn)
    objective = objective if metrics is None else dataclasses.replace(objective, metrics=dict(metrics))
    sizes = check_clients(
        clients,
        rounds=rounds,
        clients_per_round=strategy.clients_per_round,
        test=test,
        client_tests=client_tests,
    )
    example = example_of(model, objective, (test, *clients), collate_fn)
    network = prepared(model, config, method, example=example)
    network = network if device is None else network_on(network, device)
    server = Server(
        network,
        method=method,
        rounds=rounds,
        samples=dict(enumerate(sizes)),
        limits=strategy.limits,
        strategy=strategy,
        run=secrets.token_hex(16),
    )
    settings = settings_of(network, method, training, strategy, rounds=rounds, sizes=sizes)
    models, plans = planned_models(model, network, clients, training, objective=objective, collate=collate_fn)
    if plans:
        settings[PLANS] = plans
    history = History(settings=settings, model=network)
    directory = None if checkpoint_dir is None else usable_directory(checkpoint_dir)
    if keep_rounds and directory is None:
        raise ConfigError(
            "federated.run: keep_rounds=True needs a directory; expected checkpoint_dir='run' or the like"
        )
    states = go_on(directory, server, history, is_exact=resume == "exact") if directory and resume else {}
    table = Table(
        server=server,
        history=history,
        strategy=strategy,
        clients=len(clients),
        states=states,
        sample=lambda client: sample_of(clients[client], collate_fn),
        objective=objective,
        collate=collate_fn,
        test=test,
        client_tests=client_tests,
        directory=directory,
        keep_rounds=keep_rounds,
        progress=progress,
        callbacks=tuple(on_round) if isinstance(on_round, Sequence) else (on_round,),
    )
    if not table.is_over and len(history.rounds) < rounds:
        crew = Crew(
            network=network,
            training=training,
            objective=objective,
            collate=collate_fn,
            datasets=clients,
            strategy=strategy,
            threads=torch.get_num_threads(),
            models=models,
        )
        with crew_at_work(engine, crew, table, parallel=parallel) as peers:
            play(table, peers, rounds=rounds)
    network.eval()
    return history
