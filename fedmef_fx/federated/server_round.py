"""What code of one's own finds of a round at the server, and what it can do there: see `hooks.ServerHooks`."""

import dataclasses
from collections.abc import Mapping, MutableMapping

from torch import Tensor

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.aligned import recalled, remember, under
from fedmef_fx.federated.state import ModelState

__all__ = ["ServerRound"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ServerRound:
    """One round at the server.

    Weights are looked at by name: of a masked one the active values `[active]`, in row-major order; of any other one
    that is trained the tensor itself. Buffers, such as running statistics, are no weights.

    Attributes:
        round_index: t, counted from 0.
        clients: How many clients the run has; None where the server was not told.
        sent: What the clients of this round start from.
        trained: Names of the weights without a mask that are trained.
        memory: Tensors to remember from round to round, by name; part of checkpoints.
    """

    round_index: int
    clients: int | None
    sent: ModelState
    trained: tuple[str, ...]
    memory: MutableMapping[str, Tensor]

    def weights(self, state: ModelState | None = None) -> dict[str, Tensor]:
        """All weights that are trained, of a state; None for what is sent."""
        state = state or self.sent
        return {**state.values, **{name: state.dense[name] for name in self.trained}}

    def group(self, name: str) -> dict[str, Tensor]:
        """Tensors as `ServerHooks.expected` wants them: `<name>/<weight>` for each weight, of its form."""
        return {f"{name}/{weight}": tensor for weight, tensor in self.weights().items()}

    def changes(self, averaged: ModelState) -> dict[str, Tensor]:
        """By how much each weight of an average has moved from what was sent, under the average's masks."""
        before = self._before(averaged)
        return {name: tensor - before[name] for name, tensor in self.weights(averaged).items()}

    def moved(self, averaged: ModelState, moves: Mapping[str, Tensor]) -> ModelState:
        """The average, but with weights that moved otherwise from what was sent.

        Args:
            averaged: The average; its masks, and what is not named, stay.
            moves: Name of a weight -> by how much it moves, in the form of `changes`.

        Raises:
            ConfigError: A name that is no weight, or a tensor of another form.
        """
        before = self._before(averaged)
        for name, move in moves.items():
            if name not in before or move.shape != before[name].shape:
                raise ConfigError(
                    f"ServerRound.moved: {name!r}: got {list(move.shape)}; expected the names and forms of "
                    "ServerRound.changes"
                )
        new = {name: before[name] + move for name, move in moves.items()}
        values = {name: new.get(name, values).to(values.dtype) for name, values in averaged.values.items()}
        dense = {name: new.get(name, tensor).to(tensor.dtype) for name, tensor in averaged.dense.items()}
        return dataclasses.replace(averaged, values=values, dense=dense)

    def remember(self, group: str, tensors: Mapping[str, Tensor], state: ModelState | None = None) -> None:
        """Keep tensors in the form of the weights for later rounds; they follow changes of masks.

        Args:
            group: A name for them.
            tensors: Name of a weight -> tensor.
            state: Under whose masks; None for what is sent.
        """
        remember(self.memory, group, tensors, (state or self.sent).masks)

    def recall(self, group: str, state: ModelState | None = None) -> dict[str, Tensor]:
        """What was kept under this name, in the form of a state's weights; zeros where nothing was kept."""
        state = state or self.sent
        return recalled(self.memory, group, self.weights(state), state.masks)

    def _before(self, averaged: ModelState) -> dict[str, Tensor]:
        """The weights that were sent, under an average's masks."""
        values = {
            name: under(tensor, self.sent.masks[name], averaged.masks[name])
            for name, tensor in self.sent.values.items()
        }
        return values | {name: self.sent.dense[name] for name in self.trained}
