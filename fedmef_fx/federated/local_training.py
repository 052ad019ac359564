"""`LocalTraining`: how clients train."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self, get_args, get_type_hints

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.messages import RoundTask

__all__ = ["LocalTraining", "OptimizerFactory", "cosine"]

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], Optimizer]
"""Makes an optimizer of parameters and a learning rate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How clients train. The optimizer is new in every round: clients keep no state of it.

    Attributes:
        epochs: E, passes over the local data per round, >= 1.
        batch_size: Samples per batch, >= 1. A last batch of one sample joins the one before it. Sparse networks need
            steps: on clients with few samples two passes in batches of 16 reach what one in batches of 32 misses by
            far, see docs/choosing.md.
        optimizer: `"sgd"`, `"adam"`, or a function that makes one of parameters and a learning rate, such as
            `lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate)`; histories know it by its name.
        learning_rate: eta_0, > 0. NSConv networks diverge at rates that BatchNorm allows; `Config.gradient_clipping`
            widens the range.
        momentum: Of SGD, in [0, 1).
        weight_decay: >= 0; acts on active weights only, as masked ones are 0.
        schedule: The rate within a local training: `"constant"`, or `"cosine"` down to 0 at its end. Only where the
            rate decays can the rate floor of extrusion act.
        round_schedule: The rate over the rounds of a run: `"constant"`, or `"cosine"` down to 0 after the last.
        growth_batches: Batches from which growth candidates, and what else a method's adjustment asks for, are
            computed, >= 1; None for all local data. More take time, and sums of 2 bytes per inactive weight.
        weight_storage: How a `Client` stores its masked weights: `"packed"`, the active values alone with their
            gradients and optimizer state, however its model came; `"dense"` leaves its model as it came. The results
            are the same up to rounding.

    Raises:
        ConfigError: A value out of range; the message gives the field, the value and the range.
    """

    epochs: int = 2
    batch_size: int = 16
    optimizer: Literal["sgd", "adam"] | OptimizerFactory = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    round_schedule: Literal["constant", "cosine"] = "constant"
    growth_batches: int | None = 1
    weight_storage: Literal["packed", "dense"] = "packed"

    @classmethod
    def of(cls, training: Self | Mapping[str, Any] | None) -> Self:
        """The training that a caller means.

        Args:
            training: A `LocalTraining`, its fields by name, or None for the defaults.

        Raises:
            ConfigError: Something else, an unknown field, or a value out of range.
        """
        if isinstance(training, cls):
            return training
        if training is not None and not isinstance(training, Mapping):
            raise ConfigError(
                f"training: got {type(training).__name__}; expected a LocalTraining, or its fields as a dictionary, "
                'e.g. {"epochs": 1}'
            )
        fields = dict(training or {})
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ConfigError(f"training: got {', '.join(map(repr, unknown))}; expected some of {', '.join(known)}")
        return cls(**fields)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices = get_args(hint)
            if getattr(hint, "__origin__", None) is Literal and getattr(self, name) not in choices:
                self._reject(name, " | ".join(map(repr, choices)))
        if not callable(self.optimizer) and self.optimizer not in ("sgd", "adam"):
            self._reject("optimizer", "'sgd' | 'adam', or a function of parameters and a learning rate")
        for name in ("epochs", "batch_size", "growth_batches"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1) and not (name == "growth_batches" and value is None):
                self._reject(name, "an integer >= 1" + (", or None for all" if name == "growth_batches" else ""))
        if not (_is_number(self.learning_rate) and self.learning_rate > 0):
            self._reject("learning_rate", "a number > 0")
        if not (_is_number(self.momentum) and 0 <= self.momentum < 1):
            self._reject("momentum", "a number in [0, 1)")
        if not (_is_number(self.weight_decay) and self.weight_decay >= 0):
            self._reject("weight_decay", "a number >= 0")

    def _reject(self, name: str, expected: str) -> None:
        raise ConfigError(f"LocalTraining.{name}: got {getattr(self, name)!r}; expected {expected}")

    def learning_rate_in(self, task: RoundTask) -> float:
        """eta_0 of a round."""
        if self.round_schedule == "constant":
            return self.learning_rate
        return self.learning_rate * cosine(task.round_index / task.rounds)

    def make_optimizer(self, model: nn.Module, rate: float) -> Optimizer:
        """A new optimizer for a model.

        Args:
            model: Its parameters that need a gradient are trained.
            rate: The learning rate.

        Raises:
            ConfigError: A factory that makes something else.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.optimizer == "adam":
            return Adam(parameters, lr=rate, weight_decay=self.weight_decay)
        if self.optimizer == "sgd":
            return SGD(parameters, lr=rate, momentum=self.momentum, weight_decay=self.weight_decay)
        made = self.optimizer(parameters, rate)
        if not isinstance(made, Optimizer):
            raise ConfigError(
                f"LocalTraining.optimizer: {_name_of(self.optimizer)} made a {type(made).__name__}; expected a "
                "torch.optim.Optimizer, e.g. lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate)"
            )
        return made

    def settings(self) -> dict[str, Any]:
        """What a run depends on, as JSON can hold it."""
        return {**dataclasses.asdict(self), "optimizer": _name_of(self.optimizer)}


def _name_of(optimizer: object) -> str:
    """What histories call an optimizer."""
    if isinstance(optimizer, str):
        return optimizer
    if isinstance(optimizer, functools.partial):
        given = [*map(repr, optimizer.args), *(f"{name}={value!r}" for name, value in optimizer.keywords.items())]
        return f"{_name_of(optimizer.func)}({', '.join(given)})"
    owner = optimizer if hasattr(optimizer, "__qualname__") else type(optimizer)
    return f"{owner.__module__}.{owner.__qualname__}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cosine(progress: float) -> float:
    """From 1 at the start to 0 at the end."""
    return (1 + math.cos(math.pi * progress)) / 2
