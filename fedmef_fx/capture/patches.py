"""Let calls become nodes that torch.fx does not see by itself: tensor factories and custom autograd functions.

torch's argument parser refuses proxies in factories before any override could see them, and `autograd.Function.apply`
would run its forward on proxies and lose its backward; therefore they are patched during a trace. Activation
checkpointing is refused at the same place: a graph would drop it, or call what runs under it as one opaque thing.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import fx
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from fedmef_fx.errors import CaptureError

__all__ = ["traced_calls"]

_FACTORIES: Final = (
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "tensor",
    "tril_indices",
    "zeros",
)
_RANDOM_FACTORIES: Final = ("bernoulli", "normal", "rand", "randint", "randn", "randperm")


@contextlib.contextmanager
def traced_calls(tracer: fx.Tracer, *, is_paused: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """A block in which factories and custom autograd functions of traced values, and random factories, become nodes.

    Args:
        tracer: Makes the nodes.
        is_paused: Whether calls go through unchanged at this moment.
    """
    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_RANDOM_FACTORIES)}
    apply, enter = vars(Function)["apply"], saved_tensors_hooks.__enter__
    base: Any = Function.__mro__[1]  # where `run = MyFunction.apply`, taken before the trace, arrives
    thread = threading.get_ident()

    def is_traced() -> bool:
        return threading.get_ident() == thread and not is_paused()

    def traced(function: Callable[..., object], *, always: bool) -> Callable[..., object]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> object:
            if is_traced() and (always or _has_proxy(args, kwargs)):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def traced_apply(cls: type[Function], *args: Any, **kwargs: Any) -> object:
        if is_traced() and _has_proxy(args, kwargs):
            if any(callable(leaf) and not _is_proxy(leaf) for leaf in pytree.tree_leaves((args, kwargs))):
                raise CaptureError(
                    f"forward hands code to {cls.__name__}, as activation checkpointing does, which runs it again in "
                    "backward: a graph would not show what it runs"
                )
            return tracer.create_proxy("call_function", _apply_of(cls), args, kwargs)
        return apply.__get__(None, cls)(*args, **kwargs)

    def bound_apply(cls: type[Function], *args: Any, **kwargs: Any) -> object:
        if is_traced() and _has_proxy(args, kwargs):
            return traced_apply(cls, *args, **kwargs)
        return super(base, cls).apply(*args, **kwargs)

    def refuse(hooks: saved_tensors_hooks) -> None:
        if not is_traced():
            return enter(hooks)
        raise CaptureError(
            "forward runs part of itself under activation checkpointing or other hooks on saved tensors, which a graph "
            "would drop"
        )

    try:
        for name, function in originals.items():
            setattr(torch, name, traced(function, always=name in _RANDOM_FACTORIES))
        Function.apply = classmethod(traced_apply)  # type: ignore[assignment]
        base.apply = classmethod(bound_apply)
        saved_tensors_hooks.__enter__ = refuse  # type: ignore[method-assign]  # undone below
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]  # undone below
        for name, function in originals.items():
            setattr(torch, name, function)
        Function.apply = apply  # type: ignore[method-assign]  # what it was
        del base.apply


def _has_proxy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(_is_proxy(leaf) for leaf in pytree.tree_leaves((args, kwargs)))


def _is_proxy(value: object) -> bool:
    return issubclass(type(value), fx.Proxy)


class _Apply:
    """`function.apply` with a name that generated code can use, the same object each time."""

    __module__ = "fedmef_fx.capture.patches"

    def __init__(self, function: type[Function]) -> None:
        self.function = function
        self.__name__ = self.__qualname__ = f"apply_{function.__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch's own

    def __reduce__(self) -> Any:
        return _apply_of, (self.function,)


@functools.lru_cache(maxsize=4096)
def _apply_of(function: type[Function]) -> _Apply:
    return _Apply(function)
