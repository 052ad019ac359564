"""How a call looks: which arguments are passed, and of what kind. A traced graph serves the calls that look alike.

A call is normalised first: positional and keyword arguments become one dictionary by the names in `forward`, and
arguments that equal their default are left out, so that `f(x)`, `f(x=x)` and `f(x, mask=None)` are the same call.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmef_fx.graph.compiled import ORIGINAL_FORWARD
from fedmef_fx.ops.autocast import autocast_dtype

__all__ = ["AnyCall", "AnyTensors", "Call", "Signature"]

PLAIN: Final = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, slice)
"""Types of values that can be part of a signature: compared by value, never changed by a forward."""

_Key: TypeAlias = tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        arguments: By name, without those that equal their default.
        leaves: What the arguments contain, in order.
        structure: How the leaves are nested.
    """

    arguments: dict[str, Any]
    leaves: tuple[Any, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Self | None:
        """Normalise a call; None where `forward` does not take these arguments."""
        try:
            bound = _forward_signature(_forward_of(module)).bind(*args, **kwargs)
        except TypeError:
            return None
        parameters = bound.signature.parameters
        arguments = {
            name: value for name, value in bound.arguments.items() if not _is_default(value, parameters[name].default)
        }
        leaves, structure = pytree.tree_flatten(arguments)
        return cls(arguments, tuple(leaves), structure)

    @functools.cached_property
    def shape(self) -> str:
        """The structure as text, which can be compared, copied and pickled."""
        return str(self.structure)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def opaque(self) -> str | None:
        """The type of an argument that no graph can take, such as a cache; None where there is none."""
        strange = (leaf for leaf in self.leaves if not isinstance(leaf, (Tensor, *PLAIN)))
        return next((type(leaf).__name__ for leaf in strange), None)

    def replace_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same call with other tensors."""
        leaves = tuple(function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)
        return dataclasses.replace(self, arguments=pytree.tree_unflatten(leaves, self.structure), leaves=leaves)

    def on(self, forward: Callable[..., Any], module: nn.Module) -> Any:
        """Make the call: `forward` takes the arguments as the module's own does."""
        positional, keywords = _as_passed(_forward_signature(_forward_of(module)), self.arguments)
        return forward(*positional, **keywords)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The calls that a graph serves.

    Attributes:
        structure: How the arguments are nested, as text.
        key: Per leaf its value, or dtype, device and rank (or whole shape) of a tensor; the state of autocast.
        exact: Whether the graph holds for tensors of these very shapes only.
    """

    structure: str
    key: _Key
    exact: bool

    @classmethod
    def of(cls, call: Call, *, exact: bool) -> Self:
        """The signature of a call."""
        return cls(call.shape, _key(call, exact=exact), exact)

    def accepts(self, call: Call) -> bool:
        """Whether a graph of this signature serves a call."""
        return self.structure == call.shape and self.key == _key(call, exact=self.exact)


@dataclasses.dataclass(frozen=True)
class AnyTensors:
    """The calls that pass just some arguments, all of them tensors: what a trace without example inputs serves.

    Attributes:
        names: The arguments.
    """

    names: frozenset[str]

    def accepts(self, call: Call) -> bool:
        """Whether a graph of this signature serves a call."""
        return call.arguments.keys() == self.names and all(isinstance(leaf, Tensor) for leaf in call.leaves)


@dataclasses.dataclass(frozen=True)
class AnyCall:
    """Every call: the graph itself asserts that optional arguments have the values it was traced with."""

    def accepts(self, _: Call) -> bool:
        """Whether a graph of this signature serves a call: always."""
        return True


def _key(call: Call, *, exact: bool) -> _Key:
    kinds: list[object] = []
    for leaf in call.leaves:
        if isinstance(leaf, Tensor):
            kinds.append((leaf.dtype, leaf.device.type, tuple(leaf.shape) if exact else leaf.dim()))
        else:
            # The type as well: True == 1. An opaque object equals only itself, so no other call matches it.
            kinds.append((type(leaf), repr(leaf) if isinstance(leaf, slice | float) else leaf))
    device = call.tensors[0].device.type if call.tensors else "cpu"
    return (*kinds, autocast_dtype(device))


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    # An instance may have a forward of its own; for a transformed module the original's signature is inherited.
    own = vars(module).get("forward") or vars(module).get(ORIGINAL_FORWARD)
    return own or functools.partial(type(module).forward, None)


def _forward_signature(forward: Callable[..., Any]) -> inspect.Signature:
    if isinstance(forward, functools.partial) and forward.args == (None,):
        return _method_signature(forward.func)
    return inspect.signature(forward)


@functools.lru_cache(maxsize=4096)
def _method_signature(method: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _as_passed(signature: inspect.Signature, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by name, some left out, as positional and keyword ones."""
    positional: list[Any] = []
    keywords: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name not in arguments:
            # What follows a gap can only be passed by keyword, unless the gap is filled with its default.
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                positional.append(parameter.default)
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional += arguments[name]
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            keywords |= arguments[name]
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY or keywords:
            keywords[name] = arguments[name]
        elif len(positional) == _position(signature, name):
            positional.append(arguments[name])
        else:
            keywords[name] = arguments[name]
    return positional, keywords


def _position(signature: inspect.Signature, name: str) -> int:
    return list(signature.parameters).index(name)


def _is_default(value: object, default: object) -> bool:
    if value is default:
        return True
    return isinstance(value, bool | int | float | str) and type(value) is type(default) and value == default
