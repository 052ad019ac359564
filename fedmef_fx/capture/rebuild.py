"""Objects that forward makes and returns, made again by the graph: outputs as dataclasses, caches, named tuples.

torch.fx knows tuples, lists and dictionaries. Any other object that holds traced tensors is taken apart into its
tensors and a skeleton; a node puts fresh copies together from them each time the graph runs.
"""

import collections
import dataclasses
import itertools
import types
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fedmef_fx.errors import CaptureError

__all__ = ["Constant", "Hole", "Made", "Rebuild"]

_ATOMS: Final = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, type)
_DEPTH: Final = 12


@dataclasses.dataclass(frozen=True)
class Hole:
    """Where a tensor stands: its place among those that `Rebuild` takes."""

    index: int


@dataclasses.dataclass(frozen=True)
class Made:
    """An object: how it is made, and from what.

    Attributes:
        kind: Its class.
        way: "call" with positional parts, "fields" by keyword, "items" for mappings, "state" for its `__dict__`.
        parts: Skeletons, by name or key.
    """

    kind: type
    way: str
    parts: tuple[tuple[Any, Any], ...]


@dataclasses.dataclass(frozen=True)
class Constant:
    """Something that no call changes."""

    value: Any

    def __repr__(self) -> str:
        return f"{type(self.value).__name__}@{id(self.value):x}"


class Rebuild:
    """A function from tensors to an object of a fixed make; the target of a `call_function` node."""

    __module__ = "fedmef_fx.capture.rebuild"

    def __init__(self, skeleton: Any, kind: type) -> None:
        self.skeleton = skeleton
        self.__name__ = self.__qualname__ = f"rebuild_{kind.__name__}"

    @classmethod
    def of(cls, value: object) -> "Rebuild | None":
        """How to make a value again; None for what torch.fx takes unchanged.

        Raises:
            CaptureError: An object with tensors that cannot be taken apart.
        """
        if type(value) in (tuple, list, dict, slice, range) or isinstance(value, (*_ATOMS, nn.Module)):
            return None
        if _is_hole(value) or not _contains(value, _DEPTH):
            return None
        return cls(_take_apart(value, itertools.count(), set()), type(value))

    def holes_of(self, value: object) -> list[Any]:
        """The tensors of a value, in the order in which `__call__` takes them."""
        tensors: list[Any] = []
        _collect(value, tensors)
        return tensors

    def __call__(self, *tensors: Any) -> Any:
        """Make the object."""
        return _make(self.skeleton, tensors)

    def __repr__(self) -> str:
        return f"{self.__name__}({self.skeleton!r})"


def _parts(value: object) -> tuple[str, tuple[tuple[Any, Any], ...]] | None:
    """How an object is made and from what; None for an atom."""
    kind = type(value)
    if isinstance(value, (*_ATOMS, nn.Module, types.FunctionType, types.MethodType, types.ModuleType)):
        return None
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "call", tuple(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list | set) and kind in (tuple, list, set, torch.Size):
        return "sequence", tuple(enumerate(value))
    if dataclasses.is_dataclass(value) and all(field.init for field in dataclasses.fields(value)):
        return "fields", tuple((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    if kind in (dict, collections.OrderedDict):
        return "items", tuple(value.items())  # type: ignore[attr-defined]  # a dictionary
    if isinstance(value, tuple | list | dict | set) or not hasattr(value, "__dict__"):
        return None
    return "state", tuple(vars(value).items())


def _is_hole(value: object) -> bool:
    return issubclass(type(value), fx.Proxy) or isinstance(value, Tensor)


def _contains(value: object, depth: int) -> bool:
    """Whether a value holds a tensor."""
    if _is_hole(value):
        return True
    parts = _parts(value) if depth else None
    return parts is not None and any(_contains(part, depth - 1) for _, part in parts[1])


def _take_apart(value: object, counter: Iterator[int], above: set[int]) -> Any:
    if _is_hole(value):
        return Hole(next(counter))
    parts = _parts(value)
    if parts is None or not _contains(value, _DEPTH):
        # Nothing of it depends on the call, so the object itself is returned each time, as forward does.
        return value if isinstance(value, _ATOMS) else _fresh(value, parts)
    if id(value) in above:
        raise CaptureError(f"forward returns a {type(value).__name__} that contains itself")
    below = above | {id(value)}
    way, entries = parts
    taken = tuple((name, _take_apart(part, counter, below)) for name, part in entries)
    return Made(type(value), way, taken)


def _fresh(value: object, parts: tuple[str, tuple[tuple[Any, Any], ...]] | None) -> Any:
    # Containers are made again each time, because the caller may change them.
    if parts is not None and parts[0] in ("sequence", "items") and type(value) is not torch.Size:
        return Made(type(value), parts[0], tuple((name, _fresh(part, _parts(part))) for name, part in parts[1]))
    return value if isinstance(value, _ATOMS) else Constant(value)


def _collect(value: object, found: list[Any]) -> None:
    if _is_hole(value):
        found.append(value)
        return
    parts = _parts(value)
    if parts is not None and _contains(value, _DEPTH):
        for _, part in parts[1]:
            _collect(part, found)


def _make(skeleton: Any, tensors: tuple[Any, ...]) -> Any:
    if isinstance(skeleton, Hole):
        return tensors[skeleton.index]
    if isinstance(skeleton, Constant):
        return skeleton.value
    if not isinstance(skeleton, Made):
        return skeleton
    parts = {name: _make(part, tensors) for name, part in skeleton.parts}
    kind: Any = skeleton.kind
    if skeleton.way == "call":
        return kind(*parts.values())
    if skeleton.way == "sequence":
        return kind(parts.values())
    if skeleton.way == "fields":
        return kind(**parts)
    if skeleton.way == "items":
        return kind(parts)
    new = kind.__new__(kind)
    new.__dict__.update(parts)
    return new
