"""Differential privacy of clients: what each changes is clipped, and noise is added to the average.

    u_i = (w_i - w) * min(1, C / |w_i - w|)               over all floating-point tensors together
    w  <- w + 1/n (sum_i u_i + N(0, (z C)^2))             on active weights and all other floating-point tensors

Clients count alike. What one client can change of the sum is bounded by C, so each round is a Gaussian mechanism of
noise multiplier z on a sample of the clients (McMahan et al., ICLR 2018); what several rounds cost is added up by the
accountant of dp-accounting, for clients that are drawn without replacement and replaced by others.

Covered is the model that the server sends and keeps, masks included as long as no client has a say in them. The server
itself is trusted. Losses, metrics and counts of clients in the history are not covered, nor is anything that a strategy
does with updates.
"""

import dataclasses
import math
import secrets
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.aggregation import change_norm, scaled
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.seeds import derive_seed
from fedmef_fx.federated.state import ModelState

if TYPE_CHECKING:
    from fedmef_fx.federated.history import History

__all__ = ["Privacy"]

_SEED: Final = "privacy/seed"
_VARIANCE: Final = "running_var"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Privacy:
    """How updates are clipped, and how much noise their average gets.

    Attributes:
        norm: C, the largest L2 norm of what a client changes, > 0.
        noise: z, deviation of the noise on the sum in units of C, > 0.
        protects_masks: Whether methods in which clients have a say in masks are refused: growth candidates, scores and
            own masks get no noise. False takes them, and covers weights alone.
        seed: Of the noise; None for one that is drawn in secret and kept in the checkpoint. Noise of a seed that others
            know hides nothing: for experiments that have to be repeated.

    Raises:
        ConfigError: A value out of range.

    Example:
        >>> strategy = Strategy(clients_per_round=50, privacy=Privacy(norm=0.5, noise=1.0))  # doctest: +SKIP
        >>> history = run(net, clients, rounds=100, method="static-random", strategy=strategy)  # doctest: +SKIP
        >>> strategy.privacy.spent(history, delta=1e-5)  # doctest: +SKIP
    """

    norm: float
    noise: float
    protects_masks: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"Privacy.{name}: got {value!r}; expected a number > 0")
        if self.seed is not None and type(self.seed) is not int:
            raise ConfigError(f"Privacy.seed: got {self.seed!r}; expected an integer, or None")

    def clipped(self, updates: Sequence[Update], sent: ModelState) -> list[Update]:
        """Updates none of which changes more than `norm`, and which count alike."""
        result = []
        for update in updates:
            norm = change_norm(update, sent)
            own = update if norm <= self.norm else scaled(update, sent, self.norm / norm)
            result.append(dataclasses.replace(own, samples=1))
        return result

    def noisy(
        self, averaged: ModelState, sent: ModelState, clients: int, memory: MutableMapping[str, Tensor]
    ) -> ModelState:
        """The average with noise.

        Args:
            averaged: Of clipped updates that count alike.
            sent: What the clients started from.
            clients: n.
            memory: Of the server.
        """
        generator = torch.Generator().manual_seed(derive_seed(self._secret(memory), "noise", sent.version))
        deviation = self.noise * self.norm / clients

        def noised(tensor: Tensor) -> Tensor:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return (tensor.double() + deviation * noise).to(tensor.dtype)

        values = {name: noised(averaged.values[name]) for name in sorted(averaged.values)}
        dense = {}
        for name in sorted(averaged.dense):
            tensor = averaged.dense[name]
            # Counters say how many steps clients took: they stay as they were.
            dense[name] = noised(tensor) if tensor.is_floating_point() else sent.dense[name]
            if name.rpartition(".")[2] == _VARIANCE:
                dense[name] = dense[name].clamp_min(0.0)
        return dataclasses.replace(averaged, values=values, dense=dense)

    def _secret(self, memory: MutableMapping[str, Tensor]) -> int:
        if self.seed is not None:
            return self.seed
        if _SEED not in memory:
            memory[_SEED] = torch.tensor(secrets.randbits(62))
        return int(memory[_SEED])

    def spent(self, history: "History", *, delta: float) -> float:
        """Epsilon of a run: what its model tells about any one client, with probability 1 - `delta` at most.

        Args:
            history: Of a run with this privacy, interrupted or not.
            delta: In (0, 1), well below 1 / number of clients.

        Raises:
            ConfigError: dp-accounting is not installed, a delta out of range, or a history without clients.
        """
        if not 0 < delta < 1:
            raise ConfigError(f"Privacy.spent: delta: got {delta!r}; expected a number in (0, 1)")
        sizes = history.settings.get("client_samples", [])
        if not sizes:
            raise ConfigError("Privacy.spent: got a history without settings; expected one of federated.run")
        asked = (history.settings["clients_per_round"] or len(sizes)) + history.settings["strategy"].get("reserves", 0)
        rounds = sum(bool(record.clients) for record in history.rounds)
        return self.epsilon(clients=len(sizes), asked=min(asked, len(sizes)), rounds=rounds, delta=delta)

    def epsilon(self, *, clients: int, asked: int, rounds: int, delta: float) -> float:
        """Epsilon of so many rounds, e.g. to choose the noise before a run.

        Args:
            clients: How many clients there are.
            asked: How many of them are drawn for a round, reserves included.
            rounds: Rounds in which updates were averaged.
            delta: In (0, 1).

        Raises:
            ConfigError: dp-accounting is not installed.
        """
        try:
            import dp_accounting  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise ConfigError(
                "Privacy: epsilon is computed by dp-accounting, which is not installed; pip install fedmef-fx[privacy]"
            ) from error
        accounting: Any = dp_accounting
        relation = accounting.NeighboringRelation.REPLACE_ONE
        accountant = accounting.rdp.RdpAccountant(neighboring_relation=relation)
        # A client that is replaced by another one moves the sum by 2 C at most.
        event = accounting.GaussianDpEvent(self.noise / 2)
        if asked < clients:
            event = accounting.SampledWithoutReplacementDpEvent(clients, asked, event)
        if rounds:
            accountant.compose(accounting.SelfComposedDpEvent(event, rounds))
        return float(accountant.get_epsilon(delta)) if rounds else 0.0
