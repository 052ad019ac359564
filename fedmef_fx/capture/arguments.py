"""The arguments of a traced forward: placeholders under their own names, some of them specialised to their default.

torch.fx can specialise too, but numbers the placeholders (`mask_1`), so that callers cannot pass them by name, guards
them with a private function that breaks every later trace once a graph was pickled, and generates code that does not
compile for tuples.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx, nn

from fedmef_fx.errors import CaptureError

__all__ = ["placeholders"]

_CONSTANTS: Final = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, tuple)


def placeholders(
    tracer: fx.Tracer, root: nn.Module, forward: Callable[..., Any], specialized: Mapping[str, object]
) -> tuple[Callable[..., Any], list[Any]]:
    """Placeholders for the arguments of a forward, and how to call it with them.

    Args:
        tracer: The tracer at work.
        root: The module; the first argument of `forward`.
        forward: The function to trace.
        specialized: Arguments that take their default, by name; the graph asserts that they do.

    Returns:
        A function and its arguments, as `torch.fx.Tracer.create_args_for_root` returns them.

    Raises:
        CaptureError: `*args`, or a default that cannot stand in a graph.
    """
    _, *parameters = inspect.signature(forward).parameters.values()
    positional: list[Any] = []
    named: dict[str, Any] = {}
    guards: list[tuple[fx.Proxy, str, object]] = []
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(f"*{parameter.name} takes any number of arguments; a graph has a fixed number")
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue  # empty where only named arguments are passed; other calls do not fit the graph's forward
        value: Any = _placeholder(tracer, parameter, specialized)
        if parameter.name in specialized:
            guards.append((value, parameter.name, specialized[parameter.name]))
            value = specialized[parameter.name]
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named[parameter.name] = value
        else:
            positional.append(value)
    for proxy, name, default in guards:
        _assert_default(tracer, proxy, name, default)
    return lambda *args: forward(root, *args, **named), positional


def _placeholder(tracer: fx.Tracer, parameter: inspect.Parameter, specialized: Mapping[str, object]) -> fx.Proxy:
    default = specialized.get(parameter.name, parameter.default)
    if default is inspect.Parameter.empty:
        return tracer.create_proxy("placeholder", parameter.name, (), {})
    if not isinstance(default, _CONSTANTS):
        raise CaptureError(
            f"the default of argument {parameter.name!r} is a {type(default).__name__}, which cannot stand in a graph"
        )
    return tracer.create_proxy("placeholder", parameter.name, (default,), {})


def _assert_default(tracer: fx.Tracer, proxy: fx.Proxy, name: str, default: object) -> None:
    message = (
        f"this graph was traced for {name}={default!r}, the default; transform the model with example inputs that pass "
        f"{name} to trace it for another value"
    )
    condition = tracer.create_proxy("call_function", operator.eq, (proxy, default), {})
    tracer.create_proxy("call_function", torch._assert, (condition, message), {})
