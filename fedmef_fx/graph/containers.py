"""Containers that run graphs: their length, iteration and slices show the layers, not what a transformation adds."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn

from fedmef_fx.graph.compiled import original_class

__all__ = ["container_methods"]

_PREFIX: Final = "fedmef"


def container_methods(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods that the subclass of a container's class needs; those that the user's class wrote stay."""
    if not issubclass(kind, nn.Sequential):
        return {}
    ours: dict[str, Any] = {"__len__": _length, "__iter__": _iterate, "__getitem__": _item}
    return {name: method for name, method in ours.items() if getattr(kind, name) is getattr(nn.Sequential, name)}


def _layers(module: nn.Module) -> "OrderedDict[str, nn.Module | None]":
    return OrderedDict((name, child) for name, child in module._modules.items() if not name.startswith(_PREFIX))


def _length(self: nn.Module) -> int:
    return len(_layers(self))


def _iterate(self: nn.Module) -> Iterator[nn.Module | None]:
    return iter(_layers(self).values())


def _item(self: nn.Module, index: int | slice) -> Any:
    layers = _layers(self)
    if isinstance(index, slice):  # a plain container: no graph was made for it
        kind: Any = original_class(self)
        return kind(OrderedDict(list(layers.items())[index]))
    return nn.Sequential(layers)[index]  # type: ignore[arg-type]  # torch's own index rules and messages
