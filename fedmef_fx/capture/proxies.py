"""Proxies that carry a value: Python code that looks at shapes, types, None or lengths sees those of an example call.

A tensor's proxy shows itself to `isinstance` as a tensor, hands out its dtype and rank as plain values and its sizes
as numbers that stay part of the graph. Where Python takes a plain number out of a size (`range(n)`, `if n > 1`), the
graph becomes specialised to the shapes of the example. What tensors *contain* is never shown: `bool`, `item`,
`tolist` and `numpy` are refused, because the next call has other values.
"""

import builtins
import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

from torch import Tensor, fx

from fedmef_fx.errors import CaptureError

__all__ = ["InPlaceProxy", "NumberProxy", "TensorProxy", "ValueProxy", "concrete_value", "shown_to_isinstance"]


class SpecializingTracer(Protocol):
    """What a proxy asks of the tracer that made it."""

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operation."""
        ...

    def specialize(self, proxy: "ValueProxy") -> None:
        """Note that the graph now depends on the value behind a proxy."""
        ...


class InPlaceProxy(fx.Proxy):
    """A proxy with in-place operators; those of torch.fx make new tensors, which others that hold this do not see."""

    def _in_place(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    __iadd__ = functools.partialmethod(_in_place, operator.iadd)
    __isub__ = functools.partialmethod(_in_place, operator.isub)
    __imul__ = functools.partialmethod(_in_place, operator.imul)
    __itruediv__ = functools.partialmethod(_in_place, operator.itruediv)


class ValueProxy(fx.Proxy):
    """A proxy that knows the value of its node in the example call.

    Attributes:
        tracer: Has made it.
        known: The value.
        depends_on_data: Whether sizes of the value follow from what tensors contain, as after `nonzero`.
    """

    tracer: Any  # a SpecializingTracer, which torch.fx wants to be one of its own classes

    def __init__(self, node: fx.Node, tracer: SpecializingTracer, known: Any, *, depends_on_data: bool) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]  # it is a torch.fx tracer, too
        self.known = known
        self.depends_on_data = depends_on_data

    def __hash__(self) -> int:
        return id(self)


@contextlib.contextmanager
def shown_to_isinstance() -> Iterator[None]:
    """A block in which proxies are instances of the classes that they stand for.

    A `__class__` property would do the same, but torch's C++ code follows it too and then takes a proxy for a tensor.
    """
    genuine = builtins.isinstance

    def is_instance(value: Any, classes: Any, /) -> bool:
        if genuine(value, classes):
            return True
        return type(value) in (TensorProxy, NumberProxy) and issubclass(value.shown_class, classes)

    builtins.isinstance = is_instance  # a plain function for a builtin one
    try:
        yield
    finally:
        builtins.isinstance = genuine


class TensorProxy(InPlaceProxy, ValueProxy):
    """A proxy of a tensor."""

    @property
    def shown_class(self) -> type:
        """What `isinstance` sees."""
        return Tensor

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that no class of the proxy has.
        if name in ("known", "depends_on_data", "shown_class"):
            raise AttributeError(name)
        if name in ("requires_grad", "grad_fn", "grad", "is_leaf"):
            raise CaptureError(f"forward reads .{name} of a traced tensor, which differs from call to call")
        value = getattr(self.known, name)
        if callable(value):
            return _Method(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "requires_grad", "grad"):
            raise CaptureError(f"forward sets .{name} of a traced tensor")
        object.__setattr__(self, name, value)

    def __len__(self) -> int:
        self.tracer.specialize(self)
        return len(self.known)

    def __iter__(self) -> Iterator[Any]:
        self.tracer.specialize(self)
        getitem = self.tracer.create_proxy
        return iter([getitem("call_function", operator.getitem, (self, i), {}) for i in range(len(self.known))])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def _refuse(self, *_: Any) -> NoReturn:
        raise CaptureError("forward reads the value of a traced tensor, such as `if x.sum() > 0` or `int(x)`")

    __bool__ = __int__ = __float__ = __index__ = __complex__ = __array__ = __contains__ = _refuse


class NumberProxy(ValueProxy):
    """A proxy of an integer or float that is computed from sizes."""

    # Without this, code that asks "is it iterable?" takes a number for a tuple, as every proxy can be iterated.
    __iter__ = None  # type: ignore[assignment]
    __len__ = None  # type: ignore[assignment]

    @property
    def shown_class(self) -> type:
        """What `isinstance` sees."""
        return type(self.known)

    def __getattr__(self, name: str) -> Any:
        if name in ("known", "depends_on_data", "shown_class"):
            raise AttributeError(name)
        return getattr(self._plain(), name)

    def _plain(self) -> Any:
        self.tracer.specialize(self)
        return self.known

    def __bool__(self) -> bool:
        return bool(self._plain())

    def __int__(self) -> int:
        return int(self._plain())

    def __float__(self) -> float:
        return float(self._plain())

    def __index__(self) -> int:
        return operator.index(self._plain())

    def __format__(self, spec: str) -> str:
        return format(self.known, spec)

    def __hash__(self) -> int:
        return hash(self._plain())


class _Method:
    """A method of a traced tensor, about to be called."""

    def __init__(self, owner: TensorProxy, name: str) -> None:
        self._owner = owner
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer: Any = self._owner.tracer
        return tracer.create_proxy("call_method", self._name, (self._owner, *args), kwargs)


def concrete_value(argument: Any, *, on_proxy: Callable[[ValueProxy], None] = lambda _: None) -> Any:
    """An argument with the proxies in it replaced by their values.

    Args:
        argument: Any nesting of tuples, lists, dictionaries and slices.
        on_proxy: Called with each proxy.
    """
    if issubclass(type(argument), ValueProxy):
        on_proxy(argument)
        return argument.known
    kind = type(argument)
    if kind in (list, set):
        return kind(concrete_value(part, on_proxy=on_proxy) for part in argument)
    if isinstance(argument, tuple):
        parts = [concrete_value(part, on_proxy=on_proxy) for part in argument]
        return kind(*parts) if hasattr(argument, "_fields") else kind(parts)
    if isinstance(argument, dict):
        parts_by_key = {key: concrete_value(part, on_proxy=on_proxy) for key, part in argument.items()}
        return parts_by_key if kind is dict else kind(parts_by_key)
    if kind is slice:
        return slice(
            *(concrete_value(part, on_proxy=on_proxy) for part in (argument.start, argument.stop, argument.step))
        )
    return argument
