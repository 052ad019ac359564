"""Which engine `run` plays its rounds with."""

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, get_args

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.engines.in_turn import InTurn
from fedmef_fx.federated.engines.peers import Peers
from fedmef_fx.federated.engines.processes import Processes
from fedmef_fx.federated.engines.worker import Crew
from fedmef_fx.federated.playing import Table
from fedmef_fx.federated.wire import encode_broadcast

__all__ = ["Engine", "check_engine", "crew_at_work"]

Engine = Literal["inprocess", "flower-simulation"]
"""On this machine; in Flower's simulation, on Ray (extra `flower`)."""

# Flower and Ray read these when they are imported: nothing is reported to anybody, nothing is looked up.
_QUIET: Final = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
_ENGINES: Final = get_args(Engine)


def check_engine(engine: str, parallel: int | None) -> None:
    """Refuse an engine that there is not.

    Raises:
        ConfigError: Another name, or another number of processes.
    """
    if engine not in _ENGINES:
        raise ConfigError(f"federated.run: engine: got {engine!r}; expected {' | '.join(map(repr, _ENGINES))}")
    if parallel is not None and not (type(parallel) is int and parallel >= 1):
        raise ConfigError(
            f"federated.run: parallel: got {parallel!r}; expected a number of processes >= 1, or None for this process"
        )


def crew_at_work(engine: Engine, crew: Crew, table: Table, *, parallel: int | None) -> AbstractContextManager[Peers]:
    """A block with the clients of a run.

    Args:
        engine: Where clients run.
        crew: What they need.
        table: The server's side.
        parallel: How many processes train at once; None for this process alone.
    """
    server = table.server
    if engine == "flower-simulation":
        return _simulation(crew, table, parallel=parallel)
    if parallel is None:
        client = Client(
            copy.deepcopy(crew.network),
            crew.training,
            loss_fn=crew.objective,
            collate_fn=crew.collate,
            received=server.state if table.history.rounds else None,
            strategy=crew.strategy,
            models=crew.models,
            states=table.states,
        )
        return nullcontext(InTurn(client, crew.datasets))

    def complete() -> bytes:
        return encode_broadcast(server.task(), server.state, changed=server.changed)

    return Processes(crew, count=min(parallel, table.clients), states=table.states, complete=complete)


def _simulation(crew: Crew, table: Table, *, parallel: int | None) -> AbstractContextManager[Peers]:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from fedmef_fx.federated.flower.simulation import Simulation  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ConfigError(
            "federated.run: engine='flower-simulation' needs Flower and Ray: pip install 'fedmef-fx[flower]' "
            "'flwr[simulation]'"
        ) from error
    server = table.server
    simulation: AbstractContextManager[Peers] = Simulation(
        crew,
        clients=table.clients,
        parallel=parallel,
        about=lambda: (server.state.run, server.state.version),
        state_dir=None if table.directory is None else (table.directory / "clients").resolve(),
    )
    return simulation
