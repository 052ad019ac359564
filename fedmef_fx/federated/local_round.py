"""What code of one's own finds of a client's local training, and what it can do there: see `hooks.ClientHooks`."""

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Final

from torch import Tensor, nn
from torch.optim import Optimizer

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.aligned import group_of, recalled, remember, under
from fedmef_fx.federated.messages import MOST_METRICS, RoundTask, is_metric_name
from fedmef_fx.federated.state import ModelState
from fedmef_fx.sparse_model.masks import masks
from fedmef_fx.sparse_model.parameters import masked_parameters

__all__ = ["LocalRound"]

_FLOATS: Final = (int, float)


@dataclasses.dataclass(kw_only=True, eq=False)
class LocalRound:
    """One client's local training in one round.

    Weights are looked at by name: of a masked one the active values `[active]`, in row-major order, however the model
    stores it; of any other one that is trained the tensor itself.

    Attributes:
        model: The client's model, while it is trained.
        task: What the server asked for.
        client: The client's number.
        samples: How many samples it has.
        received: What the server sent.
        optimizer: Of this local training.
        steps: Optimizer steps that are planned.
        step: How many have been taken.
        state: What this client keeps from round to round: tensors by name. It counts once the round is over.
        reply: What is sent to the server besides: tensors by name, as `ServerHooks.expected` says.
        metrics: Numbers of this client for the server, by name; recorded in the history.
    """

    model: nn.Module
    task: RoundTask
    client: int
    samples: int
    received: ModelState
    optimizer: Optimizer
    steps: int
    step: int = 0
    state: MutableMapping[str, Tensor] = dataclasses.field(default_factory=dict)
    reply: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def learning_rate(self) -> float:
        """The rate of the optimizer's first group, as it is now."""
        return float(self.optimizer.param_groups[0]["lr"])

    def weights(self) -> dict[str, Tensor]:
        """Copies of all weights that are trained, as they are now."""
        masked = masked_parameters(self.model)
        result = {name: parameter.values() for name, parameter in masked.items()}
        return result | {name: tensor.detach().clone() for name, tensor in self._dense().items()}

    def started(self) -> dict[str, Tensor]:
        """The same weights as they were received; 0 where the client has grown one since."""
        return self._as_now({**self.received.values, **{name: self.received.dense[name] for name in self._dense()}})

    def sent(self, group: str) -> dict[str, Tensor]:
        """Tensors that the server sent along, named `<group>/<weight>`, in the form of the weights."""
        return self._as_now(group_of(self.task.extras, group))

    def add_to_gradients(self, terms: Mapping[str, Tensor]) -> None:
        """Add to gradients before they are used.

        Args:
            terms: Name of a weight -> tensor in its form; weights that get no gradient are left out.
        """
        masked, dense = masked_parameters(self.model), self._dense()
        for name, term in terms.items():
            parameter = masked[name].parameter if name in masked else dense[name]
            if parameter.grad is None:
                continue
            if name not in masked or masked[name].is_packed:
                parameter.grad.add_(term.to(parameter.grad))
            else:
                parameter.grad[masked[name].mask] += term.to(parameter.grad)

    def send(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Send tensors in the form of the weights to the server, as `<group>/<weight>`, under the masks it sent."""
        now = masks(self.model)
        for name, tensor in tensors.items():
            moved = tensor.detach().cpu()
            if name in now:
                moved = under(moved, now[name].cpu(), self.received.masks[name])
            self.reply[f"{group}/{name}"] = moved.clone()

    def remember(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in the form of the weights for this client's next round; they follow changes of masks."""
        remember(self.state, group, tensors, masks(self.model))

    def recall(self, group: str) -> dict[str, Tensor]:
        """What was kept under this name, in the form that the weights have now; zeros where nothing was."""
        return recalled(self.state, group, self.weights(), masks(self.model))

    def checked_metrics(self) -> dict[str, float]:
        """The metrics, as they can be sent.

        Raises:
            ConfigError: Too many, long names, or values that are no numbers.
        """
        if len(self.metrics) > MOST_METRICS:
            raise ConfigError(f"LocalRound.metrics: got {len(self.metrics)}; expected at most {MOST_METRICS}")
        for name, value in self.metrics.items():
            if not is_metric_name(name) or isinstance(value, bool) or not isinstance(value, _FLOATS):
                raise ConfigError(
                    f"LocalRound.metrics: got {name!r:.80}: {value!r:.80}; expected a number by a name of at most 64 "
                    "plain characters, e.g. float(tensor)"
                )
        return {name: float(value) for name, value in self.metrics.items()}

    def _dense(self) -> dict[str, nn.Parameter]:
        excluded = {id(masked.parameter) for masked in masked_parameters(self.model).values()}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) not in excluded and name in self.received.dense
        }

    def _as_now(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the form of the weights as they were received, in the form that these have now."""
        device, now = next(self.model.parameters()).device, masks(self.model)
        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            moved = under(tensor, self.received.masks[name], now[name].cpu()) if name in now else tensor
            result[name] = moved.to(device, copy=True) if moved is tensor else moved.to(device)
        return result
