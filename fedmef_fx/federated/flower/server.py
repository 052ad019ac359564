"""`serve`: the body of a ServerApp. The rounds are those of `federated.run`; the clients are Flower's nodes."""

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fedmef_fx.config import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.batches import Collate
from fedmef_fx.federated.callbacks import OnRound
from fedmef_fx.federated.flower.grid_peers import GridPeers
from fedmef_fx.federated.flower.nodes import Nodes
from fedmef_fx.federated.history import History
from fedmef_fx.federated.local import LocalTraining
from fedmef_fx.federated.methods import Method, method_of
from fedmef_fx.federated.objective import LossFunction, Objective, objective_of
from fedmef_fx.federated.playing import Table, play
from fedmef_fx.federated.preparing import (
    example_of,
    network_on,
    own_strategy,
    prepared,
    sample_of,
    settings_of,
    usable_directory,
)
from fedmef_fx.federated.resuming import resume as go_on
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.federated.server import Server
from fedmef_fx.federated.strategy import Strategy

__all__ = ["serve"]


def serve(  # noqa: PLR0913  # the options of a whole run, all but grid and model by keyword
    grid: Any,
    model: nn.Module,
    config: Config | None = None,
    *,
    clients: int,
    rounds: int,
    test: Any = None,
    training: LocalTraining | None = None,
    method: str | Method = "fedmef",
    strategy: Strategy | None = None,
    loss_fn: LossFunction | Objective = F.cross_entropy,
    collate_fn: Collate | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool | Literal["exact"] = True,
    progress: Callable[[RoundRecord], None] | None = None,
    on_round: OnRound | Sequence[OnRound] = (),
    device: str | None = None,
    wait_s: float | None = None,
) -> History:
    """Train a model on the nodes of a Flower grid.

    Waits until every client has a node, then plays the rounds as `federated.run` does, with the same results. All
    clients of a round are asked at once.

    Args:
        grid: What Flower gives a ServerApp.
        model: As for `federated.run`.
        config: As for `federated.run`.
        clients: How many clients there are; nodes say which one they are, see `ClientSetup`.
        rounds: Number of rounds.
        test: Test data for the global model after every round.
        training: How clients train, for the settings of the run: nodes are given it by `ClientSetup`.
        method: As for `federated.run`.
        strategy: As for `federated.run`. With `timeout_s=None` a node that hangs holds up the round.
        loss_fn: Mean loss of a batch of outputs and targets.
        collate_fn: Makes a batch of items of the test data.
        checkpoint_dir: As for `federated.run`: where the run is saved after every round, and goes on.
        resume: As for `federated.run`.
        progress: Called with every finished round.
        on_round: As for `federated.run`.
        device: Where to evaluate; None for where the model is.
        wait_s: After how many seconds without enough nodes to give up; None for never.

    Returns:
        The history.

    Raises:
        ConfigError: Arguments that cannot be used.
        RoundError: Too few nodes, or too few usable answers.
        CheckpointError: A checkpoint that is damaged or belongs to another run.
    """
    if type(clients) is not int or clients < 1:
        raise ConfigError(f"flower.serve: clients: got {clients!r}; expected an integer >= 1")
    if type(rounds) is not int or rounds < 1:
        raise ConfigError(f"flower.serve: rounds: got {rounds!r}; expected an integer >= 1")
    strategy, method, objective = (
        own_strategy(strategy, None, clients=clients),
        method_of(method),
        objective_of(loss_fn),
    )
    example = example_of(model, objective, (test,), collate_fn)
    network = prepared(model, config, method, example=example)
    network = network if device is None else network_on(network, device)
    nodes = Nodes(grid, clients=clients)
    nodes.wait(timeout_s=wait_s)
    sizes = [nodes.samples[client] for client in range(clients)]
    server = Server(
        network,
        method=method,
        rounds=rounds,
        samples=dict(enumerate(sizes)),
        limits=strategy.limits,
        strategy=strategy,
        run=secrets.token_hex(16),
    )
    settings = settings_of(network, method, training or LocalTraining(), strategy, rounds=rounds, sizes=sizes)
    history = History(settings=settings, model=network)
    directory = None if checkpoint_dir is None else usable_directory(checkpoint_dir)
    if directory is not None and resume:
        go_on(directory, server, history, is_exact=resume == "exact")
    table = Table(
        server=server,
        history=history,
        strategy=strategy,
        clients=clients,
        states={},
        sample=lambda client: _sample(test, collate_fn),
        objective=objective,
        collate=collate_fn,
        test=test,
        directory=directory,
        progress=progress,
        callbacks=tuple(on_round) if isinstance(on_round, Sequence) else (on_round,),
    )
    if not table.is_over and len(history.rounds) < rounds:
        play(table, GridPeers(nodes, lambda: (server.state.run, server.state.version)), rounds=rounds)
    network.eval()
    return history


def _sample(test: Any, collate: Collate | None) -> Tensor:
    if test is None:
        raise ConfigError(
            "flower.serve: this method looks at an input before the first round, and the server has no data; expected "
            "test=, from which it takes one"
        )
    return sample_of(test, collate)
