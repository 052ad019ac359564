"""Containers that run graphs: their methods see the layers, not the children that a transformation adds."""

import functools
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from fedmef_fx.graph.compiled import original_class

__all__ = ["container_methods"]

_PREFIX: Final = "fedmef"
_CHANGING: Final = frozenset(
    {"__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "insert", "extend", "pop", "clear", "update"}
)
_READING: Final = frozenset(
    {"__len__", "__iter__", "__getitem__", "__contains__", "__add__", "__mul__", "__rmul__", "keys", "items", "values"}
)


def container_methods(kind: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods that the subclass of a container's class needs; those that the user's class wrote stay."""
    base = next((base for base in (nn.Sequential, nn.ModuleList, nn.ModuleDict) if issubclass(kind, base)), None)
    methods = {} if base is None else vars(base)
    inherited = {name: method for name, method in methods.items() if getattr(kind, name) is method}
    reading = {name: _reading(method) for name, method in inherited.items() if name in _READING}
    return reading | {name: _changing(method) for name, method in inherited.items() if name in _CHANGING}


def _reading(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that looks at a container, run on one of the original class; other threads may run it meanwhile."""

    @functools.wraps(method)
    def read(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = original_class(self)
        plain = kind.__new__(kind)
        vars(plain).update(vars(self), _modules=_layers(self))
        return method(plain, *args, **kwargs)

    return read


def _changing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that changes a container, run while it holds layers only."""

    @functools.wraps(method)
    def change(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ours = {name: child for name, child in self._modules.items() if name.startswith(_PREFIX)}
        self._modules = _layers(self)
        try:
            return method(self, *args, **kwargs)
        finally:
            self._modules.update(ours)

    return change


def _layers(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children by name, without ours."""
    return {name: child for name, child in module._modules.items() if not name.startswith(_PREFIX)}
