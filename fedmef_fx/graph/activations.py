"""What is known about torch's activations: one row each, which everything that treats them differently reads."""

import dataclasses
from collections.abc import Callable
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "Activation", "activation", "add_row", "rows"]


@dataclasses.dataclass(frozen=True, slots=True)
class Activation:
    """One elementwise function of one tensor.

    Attributes:
        name: What torch calls it.
        module: Its module.
        function: The function that stands for it in plain graphs.
        aliases: Its other functions, and its method; methods have forms in place.
        keeps: What autograd keeps for its backward.
        in_8_bits: Whether `fedmef_fx.ops.smooth` can keep that in 8 bits, under the same name.
        options: Attributes of the module, and arguments of the function after its input, that change its values.
        per_channel: Whether channel masks pass it.
        proves_shape: Whether folding a BatchNorm looks through it for the shape of a layer's input.
    """

    name: str
    module: type[nn.Module]
    function: Callable[..., Tensor]
    aliases: tuple[Callable[..., Tensor] | str, ...] = ()
    keeps: Literal["inputs", "output", "both"] = "inputs"
    in_8_bits: bool = False
    options: tuple[str, ...] = ()
    per_channel: bool = True
    proves_shape: bool = False

    @property
    def targets(self) -> tuple[Callable[..., Tensor] | str, ...]:
        """All targets of graph nodes that call it."""
        return (self.function, *self.aliases)

    @property
    def signature(self) -> tuple[str, ...]:
        """The names of its function's arguments, in order."""
        return ("input", *(self.options or ("inplace",)))

    def passes_channels(self, name: str) -> bool:
        """Whether what torch calls so is this function, and channel masks pass it; methods have forms in place."""
        in_place = {f"{alias}_" for alias in self.aliases if isinstance(alias, str)}
        return self.per_channel and (name == self.name or name in in_place)


ACTIVATIONS: Final[dict[Any, Activation]] = {}
"""Module type, function or method -> its row."""


def add_row(row: Activation) -> None:
    """Make an activation known under all its names."""
    ACTIVATIONS.update(dict.fromkeys((row.module, *row.targets), row))


def rows() -> tuple[Activation, ...]:
    """Every activation, once."""
    return tuple(dict.fromkeys(ACTIVATIONS.values()))


def activation(target: Any) -> Activation | None:
    """The row of a module type, function or method; None for what is no known activation."""
    try:
        return ACTIVATIONS.get(target)
    except TypeError:  # a target that cannot be hashed
        return None


def _smooth(module: type[nn.Module], function: Callable[..., Tensor], **facts: Any) -> Activation:
    return Activation(function.__name__, module, function, in_8_bits=True, **facts)


def _result(module: type[nn.Module], function: Callable[..., Tensor], *aliases: Any, **facts: Any) -> Activation:
    return Activation(function.__name__, module, function, (*aliases, function.__name__), "output", **facts)


for _row in (
    Activation("celu", nn.CELU, F.celu, keeps="both", per_channel=False),
    Activation("elu", nn.ELU, F.elu, keeps="both"),
    Activation("hardtanh", nn.Hardtanh, F.hardtanh),
    Activation("leaky_relu", nn.LeakyReLU, F.leaky_relu, proves_shape=True),
    Activation("relu6", nn.ReLU6, F.relu6, proves_shape=True),
    Activation("selu", nn.SELU, F.selu, keeps="both"),
    _smooth(nn.GELU, F.gelu, options=("approximate",), proves_shape=True),
    _smooth(nn.Hardsigmoid, F.hardsigmoid),
    _smooth(nn.Hardswish, F.hardswish, proves_shape=True),
    _smooth(nn.Mish, F.mish),
    _smooth(nn.SiLU, F.silu, proves_shape=True),
    Activation("softplus", nn.Softplus, F.softplus, in_8_bits=True, options=("beta", "threshold")),
    _result(nn.ReLU, F.relu, torch.relu, proves_shape=True),
    _result(nn.Sigmoid, torch.sigmoid, F.sigmoid, in_8_bits=True),
    _result(nn.Tanh, torch.tanh, F.tanh, in_8_bits=True, proves_shape=True),
):
    add_row(_row)
