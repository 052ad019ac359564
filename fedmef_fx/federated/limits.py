"""What no client's update may exceed, whoever sends it: checked before anything is averaged."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

from fedmef_fx.errors import ConfigError, WireError
from fedmef_fx.federated.messages import Update
from fedmef_fx.federated.state import ModelState

__all__ = ["Limits", "check_update"]

# Buffers of this name hold variances, in BatchNorm, InstanceNorm and what is made like them.
_VARIANCE: Final = "running_var"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What no update may exceed. The defaults are far beyond what training gives, and keep averages finite.

    Attributes:
        value: Largest magnitude of a weight, buffer, gradient, score or loss, > 0.
        growth: How many times the norm of the weights that were sent, plus 1, the norm of those that come back may be;
            > 0.
        samples: Largest number of samples, >= 1.
        steps: By how much an integer buffer, such as BatchNorm's counter, may rise in a round, >= 0. None falls below
            0 where it was not.

    Raises:
        ConfigError: A value out of range.
    """

    value: float = 1e9
    growth: float = 1e3
    samples: int = 2**31
    steps: int = 2**24

    def __post_init__(self) -> None:
        for name in ("value", "growth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"Limits.{name}: got {value!r}; expected a number > 0")
        for name, low in (("samples", 1), ("steps", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ConfigError(f"Limits.{name}: got {value!r}; expected an integer >= {low}")


def check_update(update: Update, sent: ModelState, limits: Limits) -> None:
    """Hold an update against the limits.

    Args:
        update: Of the shapes and dtypes that were asked for, and finite.
        sent: What the client started from.
        limits: What it may not exceed.

    Raises:
        WireError: It exceeds one; the message names the tensor.
    """
    if update.samples > limits.samples:
        raise WireError(f"update: samples: got {update.samples}; expected at most {limits.samples}")
    if abs(update.loss) > limits.value:
        raise WireError(f"update: loss: got {update.loss:.3g}; expected at most {limits.value:.3g}: it has diverged")
    gradients = {name: gradient.values for name, gradient in update.gradients.items()}
    for kind, tensors in (
        ("value", update.values),
        ("gradient", gradients),
        ("score", update.scores),
        ("extra", update.extras),
    ):
        for name, tensor in tensors.items():
            _check_magnitude(f"{kind}/{name}", tensor, limits.value)
    for name, tensor in update.dense.items():
        if tensor is not sent.dense[name]:
            _check_dense(name, tensor, sent.dense[name], limits)
    _check_norm(update, sent, limits)


def _check_magnitude(key: str, tensor: Tensor, largest: float) -> None:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = (float(bound) for bound in torch.aminmax(tensor))
    if max(-low, high) > largest:
        raise WireError(
            f"update: {key!r}: got values of up to {max(-low, high):.3g}; expected at most {largest:.3g}: training has "
            "diverged, or the update is forged"
        )


def _check_dense(name: str, tensor: Tensor, sent: Tensor, limits: Limits) -> None:
    _check_magnitude(f"dense/{name}", tensor, limits.value)
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return
    low, high = torch.aminmax(tensor)
    if name.rpartition(".")[2] == _VARIANCE and float(low) < 0:
        raise WireError(f"update: 'dense/{name}': got a variance of {float(low):.3g}; expected none below 0")
    if tensor.is_floating_point():
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(sent))
    if int(low) < min(lowest, 0) or int(high) > highest + limits.steps:
        raise WireError(
            f"update: 'dense/{name}': got {int(low)} to {int(high)}; expected {min(lowest, 0)} to "
            f"{highest + limits.steps}, as {lowest} to {highest} were sent"
        )


def _check_norm(update: Update, sent: ModelState, limits: Limits) -> None:
    allowed = limits.growth * (1 + _norm(sent.values.values()))
    if (norm := _norm(update.values.values())) > allowed:
        raise WireError(
            f"update: got weights of norm {norm:.3g}; expected at most {allowed:.3g}, {limits.growth:g} times what was "
            "sent: training has diverged, or the update is forged"
        )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in tensors))
