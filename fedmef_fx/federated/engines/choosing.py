"""Which engine `run` plays its rounds with."""

import copy
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

Engine = Literal["inprocess"]

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
    del engine
    server = table.server
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
