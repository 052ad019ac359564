"""What running `forward` at trace time may touch: attributes, buffers and random numbers. A trace leaves no trace."""

import collections
import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedmef_fx.errors import CaptureError
from fedmef_fx.ops.random_numbers import seeded

__all__ = ["ChangedAttributeError", "attributes_of", "fixed_seed", "restored", "settle", "unchanged"]

_TREE: Final = ("_buffers", "_modules", "_parameters", "training")
_CONTAINERS: Final = (dict, collections.OrderedDict, list, set)
_SEED: Final = 0
_CONSTANT: Final = "_tensor_constant"  # what torch.fx calls tensors that it finds; they outlive the trace


class ChangedAttributeError(CaptureError):
    """Forward sets an attribute of a module, which a graph would not do."""


@contextlib.contextmanager
def unchanged(module: nn.Module, *, executes: bool = False) -> Iterator[None]:
    """Undo what tracing `forward` did to a module and to random states, and refuse such a trace.

    Args:
        module: The module that is traced.
        executes: Whether the tracer runs operations while it traces. Their effects on buffers and torch's random
            numbers happen again when the graph runs, so they are undone but not refused.

    Raises:
        CaptureError: Something changed that a graph would not change.
    """
    snapshot, draws = _Snapshot(module, values=executes), _Draws()
    try:
        # The generator is that of all threads: others may draw meanwhile, which is not the model's doing.
        with contextlib.nullcontext() if executes else draws:
            yield
        snapshot.refuse_changes(executes=executes, draws=draws.seen)
    except BaseException:
        snapshot.restore()
        for key in [key for key in vars(module) if key.startswith(_CONSTANT)]:
            delattr(module, key)
        raise
    snapshot.restore()


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Undo all changes to the attributes and buffers of a module and to random states."""
    snapshot = _Snapshot(module, values=True)
    try:
        yield
    finally:
        snapshot.restore()


def settle(module: nn.Module, run: Callable[[], object]) -> set[int]:
    """Let a module do what it does in its first call only, such as filling a cache or installing hooks.

    Args:
        module: The module.
        run: Calls it. It is called twice; what the first call changes stays only if the second changes nothing more.

    Returns:
        Identities of the hooks that the module installed on its own modules.
    """
    before = {id(hook) for hook in _hooks(module)}
    first = _Snapshot(module, values=True)
    run()
    first.restore(attributes=False)
    second = _Snapshot(module, values=True)
    run()
    try:
        second.refuse_changes(executes=False, what="attributes")
    except CaptureError:
        first.restore()
        return set()
    second.restore(attributes=False)
    return {id(hook) for hook in _hooks(module)} - before


def _hooks(module: nn.Module) -> Iterator[object]:
    for child in module.modules():
        yield from child._forward_hooks.values()
        yield from child._forward_pre_hooks.values()


@contextlib.contextmanager
def fixed_seed(seed: int = _SEED) -> Iterator[None]:
    """A block in which all random numbers follow a seed; afterwards the generators are as they were."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        with seeded(seed):
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Sees this thread draw random numbers from torch's generators.

    Attributes:
        seen: Whether it has.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the same
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operation, and run it."""
        del types
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Snapshot:
    """The state of a module and of the random generators at one moment."""

    def __init__(self, module: nn.Module, *, values: bool) -> None:
        self.module = module
        self.attributes = {child: attributes_of(child) for child in module.modules()}
        self.buffers = {child: dict(child._buffers) for child in module.modules()}
        self.parameters = {child: dict(child._parameters) for child in module.modules()}
        tensors = [b for buffers in self.buffers.values() for b in buffers.values() if b is not None]
        self.versions = {id(buffer): buffer._version for buffer in tensors}
        self.values = [(buffer, buffer.detach().clone()) for buffer in tensors] if values else []
        self.torch_state = torch.get_rng_state()
        self.python_state = random.getstate()
        self.numpy_state = np.random.get_state(legacy=False)

    def restore(self, *, attributes: bool = True) -> None:
        for child, before in self.attributes.items() if attributes else ():
            _restore(child, before, self.buffers[child])
            if isinstance(child._parameters, dict):  # a scripted module has its own kind, which never changes
                child._parameters.clear()
                child._parameters.update(self.parameters[child])
        with torch.no_grad():
            for buffer, value in self.values:
                # Versions do not tell: batch normalisation updates its statistics without a new one.
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        np.random.set_state(self.numpy_state)

    def refuse_changes(
        self, *, executes: bool, what: Literal["attributes", "all"] = "all", draws: bool = False
    ) -> None:
        kind = type(self.module).__name__
        for child, before in self.attributes.items():
            self._refuse_attributes(child, before, executes=executes)
            if not executes and what == "all":
                self._refuse_buffers(child)
        if what == "attributes":
            return
        if draws:
            raise CaptureError(f"{kind}: forward draws random numbers that do not become graph nodes")
        if random.getstate() != self.python_state or not _same_state(
            np.random.get_state(legacy=False), self.numpy_state
        ):
            raise CaptureError(
                f"{kind}: forward uses Python's or NumPy's random numbers; a graph would repeat one draw forever. Use "
                "torch's random functions on the input's device"
            )

    def _refuse_attributes(self, child: nn.Module, before: Mapping[str, object], *, executes: bool) -> None:
        for key, value in attributes_of(child).items():
            # A dictionary that gains entries is a cache; the proof runs the original twice in a row with its cache.
            is_cache = executes and isinstance(value, dict) and isinstance(before.get(key), dict)
            if key.startswith(_CONSTANT) or is_cache:
                continue
            if key not in before or not _same(value, before[key]):
                raise ChangedAttributeError(
                    f"{type(self.module).__name__}: forward changes the attribute {key!r} of module "
                    f"{self._name(child)!r}; a graph would not. Register it as a buffer and change it with tensor "
                    "operations"
                )

    def _refuse_buffers(self, child: nn.Module) -> None:
        before = self.buffers[child]
        for key, buffer in child._buffers.items():
            same = key in before and buffer is before[key]
            if not same or (buffer is not None and buffer._version != self.versions[id(buffer)]):
                raise CaptureError(
                    f"{type(self.module).__name__}: forward writes buffer {key!r} of module {self._name(child)!r} "
                    "outside the graph"
                )

    def _name(self, child: nn.Module) -> str:
        return next((name for name, module in self.module.named_modules() if module is child), "") or "root"


def attributes_of(module: nn.Module) -> dict[str, object]:
    """A module's own attributes; dictionaries and lists copied one level deep, since forward may change them."""
    copied: dict[str, object] = {}
    for key, value in vars(module).items():
        if key not in _TREE:
            copied[key] = type(value)(value) if type(value) in _CONTAINERS else value
    return copied


def _same(left: object, right: object) -> bool:
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return list(left) == list(right) and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, set):
        return left == right
    return isinstance(left, int | float | str | bool | tuple) and left == right


def _same_state(left: object, right: object) -> bool:
    """Whether two states of NumPy's generator are equal: dictionaries of arrays and numbers."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_state(left[key], right[key]) for key in left)
    return np.array_equal(left, right)  # type: ignore[arg-type]  # takes anything


def _refill(container: Any, content: Any) -> None:
    # The object itself stays: handles of hooks, for instance, know it.
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _restore(module: nn.Module, attributes: Mapping[str, object], buffers: Mapping[str, Tensor | None]) -> None:
    for key in [k for k in vars(module) if k not in _TREE and k not in attributes]:
        if not key.startswith(_CONSTANT):
            delattr(module, key)
    for key, value in attributes.items():
        current = vars(module).get(key)
        if type(value) in _CONTAINERS and type(current) is type(value):
            if not _same(current, value):
                _refill(current, value)
        elif current is not value:
            vars(module)[key] = value
    same = module._buffers.keys() == buffers.keys()
    if not isinstance(module._buffers, dict):
        return  # a scripted module
    if not same or any(module._buffers[key] is not value for key, value in buffers.items()):
        module._buffers.clear()
        module._buffers.update(buffers)
