"""The server's part of a round: what to send to whom, averaging, and the adjustment of masks.

Knows nothing about transports: a round is `task`, one `broadcast` and one `receive` per client, `finish_round`.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor, nn

from fedmef_fx.errors import ConfigError, WireError
from fedmef_fx.federated.averaging import weighted_average
from fedmef_fx.federated.hooks import ServerHooks
from fedmef_fx.federated.lazy_tensors import column
from fedmef_fx.federated.limits import Limits
from fedmef_fx.federated.messages import RoundTask, Update
from fedmef_fx.federated.methods import AfterRound, Method
from fedmef_fx.federated.opening import active_budget
from fedmef_fx.federated.server_round import ServerRound
from fedmef_fx.federated.shelf import Shelf
from fedmef_fx.federated.state import ModelState, Schema, load_state, read_state, trained_names
from fedmef_fx.federated.wire import decode_update, encode_broadcast
from fedmef_fx.files.container import digest
from fedmef_fx.sparse_model.effective import effective_parameters
from fedmef_fx.sparse_model.masks import set_masks
from fedmef_fx.sparse_model.transformation import transformation_of
from fedmef_fx.sparsity.schedule import adjustment_count, is_adjustment_round
from fedmef_fx.training.adjustment import lowest_units, unit_sizes

__all__ = ["Server"]


Aggregate = Callable[[Sequence[Update], ModelState, MutableMapping[str, Tensor]], Sequence[Update]]
"""As `Strategy.aggregate`."""


class Server:
    """The server side of a federation.

    Args:
        model: The transformed model; it is changed in place and always holds the newest weights.
        method: The policies.
        rounds: Rounds of the whole run; adjustments stop there unless the configuration says otherwise.
        samples: Client -> how many samples it declared, None for any number; others' answers, and other numbers, are
            refused. None for any clients.
        limits: What no update may exceed; None for `Limits()`.
        aggregate: What becomes of updates before the method averages them, see `Strategy.aggregate`; None for what the
            strategy does.
        strategy: What takes part in rounds, the same as the clients'; None for nothing.
        update_memory: How many bytes of a round's updates stay in memory; what is beyond lies in a temporary file until
            the round ends, and is averaged block by block: the result is the same to the bit.
        run: The run's name, which every message bears; None for one that follows from model, method and rounds.

    Attributes:
        state: The model that is sent; its version is the number of finished rounds.
        changed: Name of each mask's parameter and each dense tensor -> the version in which it last changed.
        known: Client -> the version of the last broadcast that it is known to have.
        memory: What the method's adjustment and the strategy remember from round to round.
        is_opening: Whether the first masks are still to be found (`open`); all weights are active until then.
    """

    def __init__(  # all but the model by keyword
        self,
        model: nn.Module,
        *,
        method: Method,
        rounds: int,
        samples: Mapping[int, int | None] | None = None,
        limits: Limits | None = None,
        aggregate: Aggregate | None = None,
        strategy: ServerHooks | None = None,
        run: str | None = None,
        update_memory: int = 2**24,
    ) -> None:
        if rounds < 1:
            raise ConfigError(f"Server: rounds: got {rounds}; expected an integer >= 1")
        if strategy is not None:
            strategy.check_method(method)
        self.model = model
        self.schema = Schema.of(model)
        self.state = read_state(model, version=0, run=run or _run_name(model, method, rounds))
        self.changed = dict.fromkeys([*self.schema.masked, *self.schema.dense], 0)
        self.known: dict[int, int] = {}
        self.memory: dict[str, Tensor] = {}
        self.is_opening = method.opening is not None and bool(self.state.masks)
        self._method = method
        self._rounds = rounds
        self._samples = samples
        self._limits = limits or Limits()
        self._shelf, self._update_memory = Shelf(update_memory), update_memory
        self._strategy = strategy or ServerHooks()
        self._is_plain = strategy is None
        self._aggregate = aggregate or self._strategy.aggregate
        self._trained = trained_names(model, self.schema.dense)

    def restore(
        self,
        state: ModelState,
        *,
        changed: Mapping[str, int],
        known: Mapping[int, int],
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Continue from the end of an earlier round."""
        load_state(self.model, state)
        self.state, self.changed, self.known = state, dict(changed), dict(known)
        self.memory = dict(memory or {})
        self.is_opening = False

    def task(self) -> RoundTask:
        """What the current round asks of every client; during an opening, what that asks of them."""
        opening = self._method.opening if self.is_opening else None
        if opening is not None and opening.report is not None:
            return RoundTask(self.state.version, self._rounds, report=opening.report)
        report = self._method.policy.asks()
        return RoundTask(self.state.version, self._rounds, self._counts() if self._is_due() else None, report)

    @property
    def _stop(self) -> int:
        """R_stop."""
        stop = transformation_of(self.model).config.adjustment_stop
        return self._rounds if stop is None else stop

    def _is_due(self) -> bool:
        """Whether masks are adjusted at the end of the current round."""
        interval = transformation_of(self.model).config.adjustment_interval
        has_masks = self._method.adjusts and bool(self.state.masks)
        return has_masks and is_adjustment_round(self.state.version, interval=interval, stop=self._stop)

    def _counts(self) -> dict[str, int]:
        """k_l(t) of every layer in the current round."""
        rate = transformation_of(self.model).config.adjustment_rate
        return {
            name: adjustment_count(active, inactive, round_index=self.state.version, stop=self._stop, rate=rate)
            for name, (active, inactive) in unit_sizes(self.model).items()
        }

    @property
    def asks_for_opening(self) -> bool:
        """Whether clients have to report before the first round; see `open`."""
        return self.is_opening and self.task().is_opening

    def open(self, updates: Mapping[int, Update], *, sample: Tensor) -> None:
        """Find the first masks.

        Args:
            updates: Client -> its report, where `asks_for_opening`.
            sample: An input without its batch dimension.
        """
        opening = self._method.opening
        if opening is None or not self.is_opening:
            raise ConfigError(
                "Server.open: got a method without an opening, or one that is over; expected one call of it at most"
            )
        found = opening.masks(self.model, list(updates.values()), active=active_budget(self.model), sample=sample)
        set_masks(self.model, found)
        self.state = read_state(self.model, version=0, run=self.state.run)
        self.is_opening = False
        self.known = {}  # what clients were sent was the dense model

    def broadcast(self, client: int) -> bytes:
        """The message to one client: without what it is known to have."""
        task = self.task()
        if not task.is_opening:
            task = dataclasses.replace(task, extras=self._strategy.extras(client, self.now()))
        return encode_broadcast(task, self.state, changed=self.changed, known=self.known.get(client))

    def now(self) -> ServerRound:
        """The current round, as strategies see it."""
        return ServerRound(
            round_index=self.state.version,
            clients=None if self._samples is None else len(self._samples),
            sent=self.state,
            trained=self._trained,
            memory=self.memory,
        )

    def forget(self, client: int) -> None:
        """Send a complete broadcast next time: for a client that lost what it had, see `MissingStateError`."""
        self.known.pop(client, None)

    def receive(self, client: int, data: bytes) -> Update:
        """Read a client's answer; from now on the client is known to have this round's broadcast.

        Raises:
            WireError: Bytes that are no answer to this round's task; the message names client and round.
        """
        try:
            if self._samples is not None and client not in self._samples:
                raise WireError("got an answer of a client that is not in this run; expected one that is")
            task = self.task()
            update = decode_update(
                data,
                task=task,
                sent=self.state,
                client=client,
                samples=None if self._samples is None else self._samples[client],
                limits=self._limits,
                expected=self._expected(task),
                uplink=self._strategy.uplink,
                trained=self._trained,
            )
        except WireError as error:
            raise WireError(f"client {client}, round {self.state.version}: {error}") from error
        self.known[client] = self.state.version
        return self._shelf.put(update, known=self.state.dense)

    def _expected(self, task: RoundTask) -> Mapping[str, Tensor] | None:
        """Tensors that clients add to their updates; None where there is no strategy."""
        if self._is_plain:
            return None
        return {} if task.is_opening else self._strategy.expected(self.now())

    def finish_round(self, updates: Mapping[int, Update]) -> dict[str, int]:
        """Average what the clients sent, weighted by their samples, and adjust the masks where it is due.

        The result does not depend on the order of the clients.

        Args:
            updates: Client -> its update of this round, at least one.

        Returns:
            Parameter name -> number of weights that changed places; empty outside adjustment rounds.

        Raises:
            ConfigError: No updates.
        """
        if not updates:
            raise ConfigError(f"round {self.state.version}: got no updates; expected at least one client's")
        version = self.state.version + 1
        now, received = self.now(), list(updates.values())
        taken = self._aggregate(received, self.state, self.memory)
        weights = [update.samples for update in taken]
        policy, counts, is_due = self._method.policy, self._counts(), self._is_due()
        marked = lowest_units(self.model, effective_parameters(self.model), counts.__getitem__) if is_due else {}
        masks, values = policy.merged(self.state, taken)
        own = [update.dense for update in taken]
        dense = {name: weighted_average(column(own, name), weights) for name in self.schema.dense}
        averaged = ModelState(version, masks, values, dense, self.state.run)
        averaged = self._strategy.privatized(averaged, len(taken), now)
        seen = [] if self._strategy.is_private else received
        load_state(self.model, self._strategy.server_step(averaged, seen, now))
        after = AfterRound(self.model, taken, counts, is_due, self.state.version, self.memory, self.state.masks, marked)
        churn = self._strategy.adjust(after, policy)
        self._advance(version)
        self._shelf = Shelf(self._update_memory)
        return churn

    def skip_round(self) -> None:
        """End a round without enough answers: the model stays as it was."""
        self.state = dataclasses.replace(self.state, version=self.state.version + 1)
        self._shelf = Shelf(self._update_memory)

    def _advance(self, version: int) -> None:
        """Note which masks and dense tensors the new version changes."""
        state = read_state(self.model, version=version, run=self.state.run)
        for old, new in ((self.state.masks, state.masks), (self.state.dense, state.dense)):
            self.changed |= {name: version for name, tensor in new.items() if not torch.equal(tensor, old[name])}
        self.state = state


def _run_name(model: nn.Module, method: Method, rounds: int) -> str:
    """A name that runs of other models, methods, configurations or lengths do not have."""
    state = read_state(model, version=0)
    tensors = {f"value/{name}": values for name, values in state.values.items()}
    tensors |= {f"dense/{name}": tensor for name, tensor in state.dense.items()}
    config = json.loads(transformation_of(model).config.to_json())
    return digest(
        tensors, {"masks": state.mask_digest, "method": method.settings(), "config": config, "rounds": rounds}
    )[:32]
