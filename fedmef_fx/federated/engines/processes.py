"""Clients in processes of their own: several train at once, and one that dies takes nobody along."""

import contextlib
import dataclasses
import multiprocessing
import pickle
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Final, Self

from torch import Tensor

from fedmef_fx.errors import ConfigError, MissingStateError
from fedmef_fx.federated.engines.peers import Reply, how_it_ended, late_after
from fedmef_fx.federated.engines.worker import READY, Crew, Job, Outcome, serve

__all__ = ["Processes"]

_PATIENCE_S: Final = 5.0
# What every process needs; the second one takes torch a second, with the first step of an optimizer.
_IMPORTED: Final = [serve.__module__, "torch._dynamo"]


class Processes:
    """Processes that serve clients, each one at a time; a process that died or hung is replaced.

    Args:
        crew: What every process is given.
        count: How many there are, >= 1.
        states: What the strategy keeps of each client; it grows.
        complete: Makes a complete broadcast of the current round: for a process that was not there in the round on
            which a client's broadcast builds. It stays on this machine and is no part of the traffic.

    Raises:
        ConfigError: Something in the crew that cannot be sent to another process.
    """

    def __init__(
        self,
        crew: Crew,
        *,
        count: int,
        states: MutableMapping[int, dict[str, Tensor]],
        complete: Callable[[], bytes],
    ) -> None:
        try:
            self._crew = pickle.dumps(crew)
        except Exception as error:  # whatever pickling raises
            raise ConfigError(
                f"federated.run: parallel={count}: model, data sets and loss function have to be sent to other "
                f"processes, and cannot be: {type(error).__name__}: {error!s:.200}; expected functions and classes "
                "that are defined at the top of a module (no lambdas), or parallel=None"
            ) from error
        self.capacity = count
        self._states = states
        self._complete = complete
        self._context = _context()
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}
        self._done: deque[Reply] = deque()

    def __enter__(self) -> Self:
        self._idle = [_Worker(self._context, self._crew) for _ in range(self.capacity)]
        for worker in self._idle:  # they start at the same time
            worker.check_ready(self.capacity)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        workers = [*self._idle, *self._busy.values()]
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.end(patience_s=0 if worker.job else _PATIENCE_S)

    def send(self, client: int, message: bytes) -> None:
        """As `Peers.send`."""
        if not self._idle:
            self._idle.append(_Worker(self._context, self._crew))
            self._idle[-1].check_ready(self.capacity)
        worker = self._idle.pop()
        worker.start(Job(client=client, message=message, kept=self._states.get(client, {})))
        self._busy[worker.connection] = worker

    def receive(self, *, timeout_s: float | None) -> Reply:
        """As `Peers.receive`; the process of a client that is late is ended."""
        while not self._done:
            self._wait(timeout_s)
        return self._done.popleft()

    def _wait(self, timeout_s: float | None) -> None:
        """Wait for a process to say something, to end, or to be late."""
        oldest = min(worker.started for worker in self._busy.values())
        left = None if timeout_s is None else max(0.0, oldest + timeout_s - time.perf_counter())
        for connection in wait(list(self._busy), left):
            self._hear(self._busy[connection])  # type: ignore[index]  # what was waited for
        if timeout_s is None:
            return
        now = time.perf_counter()
        for worker in list(self._busy.values()):
            if now - worker.started >= timeout_s:
                self._lose(worker, late_after(now - worker.started, timeout_s), patience_s=0)

    def _hear(self, worker: "_Worker") -> None:
        """Take what a process sent; an end of its pipe is an end of the process."""
        try:
            outcome: Outcome = pickle.loads(worker.connection.recv_bytes())  # noqa: S301  # as above
        except (EOFError, OSError):
            self._lose(worker, None, patience_s=_PATIENCE_S)
            return
        error = None if outcome.error is None else pickle.loads(outcome.error)  # noqa: S301  # from our own process
        if isinstance(error, MissingStateError) and worker.job.base is None:
            worker.again(self._complete())
            return
        del self._busy[worker.connection]
        seconds = time.perf_counter() - worker.started
        client, worker.job = worker.job.client, None
        self._idle.append(worker)
        if outcome.answer is not None and (outcome.kept or client in self._states):
            self._states[client] = dict(outcome.kept)
        if outcome.answer is None and error is not None:
            self._done.append(Reply(client=client, seconds=seconds, error=error))
        else:
            self._done.append(Reply(client=client, seconds=seconds, answer=outcome.answer, reason=outcome.reason))

    def _lose(self, worker: "_Worker", reason: str | None, *, patience_s: float) -> None:
        """Give up a process and what it was at; the next message starts another one."""
        del self._busy[worker.connection]
        seconds = time.perf_counter() - worker.started
        worker.connection.close()
        exit_code = worker.end(patience_s=patience_s)
        self._done.append(Reply(client=worker.job.client, seconds=seconds, reason=reason or how_it_ended(exit_code)))


class _Worker:
    """A process, its pipe, and what it is at."""

    def __init__(self, context: Any, crew: bytes) -> None:
        self.connection, other = context.Pipe()
        # No daemon: those may have no processes of their own, which a client's data loader may want.
        self.process: BaseProcess = context.Process(target=serve, args=(other, crew))
        self.process.start()
        other.close()
        self.job: Any = None
        self.started = 0.0

    def check_ready(self, count: int) -> None:
        """Wait until the process has all it needs.

        Raises:
            ConfigError: It could not be started.
        """
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            said = f"it ended with exit code {self.end(patience_s=_PATIENCE_S)} before it was ready"
        if said != READY:
            raise ConfigError(
                f"federated.run: parallel={count}: a client process could not start: {said!s:.300}; expected a script "
                'whose own work stands under `if __name__ == "__main__":`, and functions and classes that it can '
                "import, or parallel=None"
            )

    def start(self, job: Job) -> None:
        self.job, self.started = job, time.perf_counter()
        self._send(job)

    def again(self, base: bytes) -> None:
        """Give the process the same job, with what it lacked."""
        self.job = dataclasses.replace(self.job, base=base)
        self._send(self.job)

    def _send(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # it is gone, which the next look at its pipe finds
            self.connection.send_bytes(pickle.dumps(job))

    def end(self, *, patience_s: float) -> int | None:
        """Let the process end by itself, or end it; its exit code."""
        self.process.join(patience_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def _context() -> Any:
    """How processes are started: without a copy of this one's threads and locks, from one that has imported torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context
