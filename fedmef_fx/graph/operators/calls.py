"""The arguments of calls by name."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx

from fedmef_fx.graph.operators.operator import operator_of

__all__ = ["arguments", "bound"]


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments by name that a node gives to a function or method.

    Functions that Python cannot read have the signature of their row.
    """
    parameters = _parameters(node.target)
    if parameters is not None:
        names = tuple(parameters)
    else:
        row = operator_of(node.target)
        names = () if row is None else row.signature
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def arguments(node: fx.Node) -> dict[str, Any]:
    """`bound`, with the defaults of the arguments that are not given, where Python can read them."""
    parameters = (_parameters(node.target) or {}).values()
    defaults = {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty
    }
    return defaults | bound(node)


def _parameters(target: str | Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    if not inspect.isfunction(target):
        return None
    parameters = dict(inspect.signature(target).parameters)
    is_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    return None if is_any and operator_of(target) is not None else parameters
