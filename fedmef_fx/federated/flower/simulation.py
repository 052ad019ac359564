"""Clients as virtual nodes of Flower's simulation, on Ray's processes: `federated.run(engine="flower-simulation")`."""

import queue
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation

from fedmef_fx.errors import ConfigError, RoundError
from fedmef_fx.federated.client import Client
from fedmef_fx.federated.engines.peers import Reply
from fedmef_fx.federated.engines.worker import Crew
from fedmef_fx.federated.flower.client import replying
from fedmef_fx.federated.flower.grid_peers import GridPeers
from fedmef_fx.federated.flower.node_state import ContextStore, FolderStore
from fedmef_fx.federated.flower.nodes import Nodes
from fedmef_fx.federated.flower.parcels import QUERY, TRAIN, packed

__all__ = ["Simulation"]

_LOOK_S: Final = 1.0
# Ray gives its workers the niceness 15. With other work on the machine they hardly run then: a minute becomes an hour.
_RAY: Final = {"worker_niceness": 0}


class Simulation:
    """A simulation that runs in a thread while rounds are played in this one.

    Args:
        crew: What every process is given. It goes through a file: Flower would send it with every message.
        clients: How many clients there are.
        parallel: How many may train at once; None for as many as Ray finds cores.
        about: Run and round of the messages.
        state_dir: Where clients keep what they have between rounds; None for Flower's memory.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        clients: int,
        parallel: int | None,
        about: Callable[[], tuple[str, int]],
        state_dir: Path | None,
    ) -> None:
        self._crew, self._clients, self._parallel, self._about = crew, clients, parallel, about
        self._state_dir = state_dir
        self._grid: queue.Queue[Any] = queue.Queue()
        self._is_over = threading.Event()
        self._error: BaseException | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="fedmef-fx-")
        self._thread = threading.Thread(target=self._run, name="fedmef-fx-flower", daemon=True)

    def __enter__(self) -> Self:
        path = Path(self._folder.name) / "crew"
        try:
            path.write_bytes(_pickler().dumps(self._crew))
        except Exception as error:  # whatever pickling raises
            raise ConfigError(
                f"federated.run: engine='flower-simulation': model, data sets and loss function have to be sent to "
                f"other processes, and cannot be: {type(error).__name__}: {error!s:.200}"
            ) from error
        self._path = str(path)
        self._thread.start()
        nodes = Nodes(_WatchedGrid(self._wait_for(self._grid), self._check), clients=self._clients)
        try:
            nodes.wait(timeout_s=None, are_own=True)
        except BaseException:
            self._end()
            raise
        self._peers = GridPeers(nodes, self._about)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._folder.cleanup()

    @property
    def capacity(self) -> int:
        """As `Peers.capacity`."""
        return self._peers.capacity

    def send(self, client: int, message: bytes) -> None:
        """As `Peers.send`."""
        self._peers.send(client, message)

    def receive(self, *, timeout_s: float | None) -> Reply:
        """As `Peers.receive`."""
        return self._peers.receive(timeout_s=timeout_s)

    def _wait_for(self, grids: "queue.Queue[Any]") -> Any:
        while True:
            try:
                return grids.get(timeout=_LOOK_S)
            except queue.Empty:
                self._check()

    def _check(self) -> None:
        """Whoever waits for nodes would wait for ever once the simulation has ended."""
        if not self._thread.is_alive():
            cause = self._error if self._error is None else self._error.__cause__ or self._error
            raise RoundError(
                f"federated.run: engine='flower-simulation': Flower's simulation has ended: {cause!s:.200}. "
                "Flower's log, which is shown above, says what it did last"
            ) from self._error

    def _run(self) -> None:
        app = ServerApp()

        def main(grid: Any, context: Context) -> None:
            del context
            self._grid.put(grid)
            self._is_over.wait()

        app.main()(main)
        cores = self._parallel or max(1, torch.multiprocessing.cpu_count())
        try:
            run_simulation(
                app,
                _client_app(self._path, self._state_dir),
                num_supernodes=self._clients,
                backend_config={
                    "init_args": {"num_cpus": cores, "include_dashboard": False, "_system_config": _RAY},
                    "client_resources": {"num_cpus": 1},
                },
            )
        except BaseException as error:  # shown where it is waited for
            self._error = error


class _WatchedGrid:
    """A grid; each look at it checks that there is still somebody behind it."""

    def __init__(self, grid: Any, check: Callable[[], None]) -> None:
        self._grid, self._check = grid, check

    def get_node_ids(self) -> Iterable[int]:
        """As Flower's."""
        self._check()
        nodes: Iterable[int] = self._grid.get_node_ids()
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's."""
        self._check()
        identities: Iterable[str] = self._grid.push_messages(messages)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        self._check()
        replies: Iterable[Message] = self._grid.pull_messages(message_ids)
        return replies


def _client_app(path: str, state_dir: Path | None) -> ClientApp:
    app = ClientApp()

    def query(message: Message, context: Context) -> Message:
        return Message(packed(client=int(context.node_config["partition-id"]), samples=1), reply_to=message)

    def train(message: Message, context: Context) -> Message:
        crew, client = _member(path)
        number = int(context.node_config["partition-id"])
        client.received = None
        client.states.clear()
        store = ContextStore(context) if state_dir is None else FolderStore(state_dir, number)
        return replying(message, client, store, data=crew.datasets[number], client=number)

    app.query(QUERY.partition(".")[2])(query)
    app.train(TRAIN.partition(".")[2])(train)
    return app


_MEMBERS: Final[dict[str, tuple[Crew, Client]]] = {}


def _member(path: str) -> tuple[Crew, Client]:
    """The crew of a file and this process's client, made once."""
    if path not in _MEMBERS:
        crew: Crew = _pickler().loads(Path(path).read_bytes())
        torch.set_num_threads(crew.threads)
        client = Client(
            crew.network,
            crew.training,
            loss_fn=crew.objective,
            collate_fn=crew.collate,
            strategy=crew.strategy,
            models=crew.models,
        )
        _MEMBERS.clear()
        _MEMBERS[path] = crew, client
    return _MEMBERS[path]


def _pickler() -> Any:
    """Ray's, which takes functions and classes of a script, too."""
    try:
        from ray import cloudpickle  # noqa: PLC0415  # an extra of Flower's own
    except ImportError as error:
        raise ConfigError(
            "federated.run: engine='flower-simulation' needs Ray: pip install 'flwr[simulation]', for a Python that "
            "Ray supports"
        ) from error
    return cloudpickle
