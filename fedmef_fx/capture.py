"""Capture: from an nn.Module to torch.fx graphs that are right in train and in eval mode, or a clear refusal.

Plain `torch.fx.symbolic_trace` is silently wrong for many real models; this tracer closes the gaps it knows:

1. The trace is made once per mode. Equal traces become one graph; different ones are kept side by side.
2. Buffers are proxied, so `self.num_batches_tracked.add_(1)` is a node and does not happen at trace time.
3. Factories (`torch.zeros`, `torch.rand`, ...) whose arguments are traced values, and all random ones, become nodes.
4. Optional arguments are specialised to their defaults, and the graph asserts that; a proxy is never None.
5. A trace that consumes random numbers, or changes attributes or buffers of the model, is undone and refused.
"""

import contextlib
import inspect
import math
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.errors import CaptureError
from fedmef_fx.program import GraphMode

__all__ = ["capture_graphs"]

_FACTORIES: Final = ("arange", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
_RANDOM_FACTORIES: Final = ("bernoulli", "normal", "rand", "randint", "randn", "randperm")
_TREE: Final = ("_buffers", "_modules", "_parameters", "training")


class _Tracer(fx.Tracer):
    """The tracer of this module; see the module docstring for what it does beyond torch.fx."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Hooks of the user run at call time, not once at trace time: such a module stays a call.
        hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        return bool(hooked) or super().is_leaf_module(m, module_qualified_name)


def capture_graphs(module: nn.Module, *, given: Mapping[str, object] | None = None) -> dict[GraphMode, fx.Graph]:
    """Trace a module in both modes.

    Args:
        module: The module; it is as it was when this returns or raises.
        given: Arguments of `forward` (by name) that callers will pass. Other arguments that have a default are
            specialised to it. None: only arguments without a default are passed.

    Returns:
        {"both": graph} where the modes agree, {"train": graph, "eval": graph} where they differ.

    Raises:
        CaptureError: The module cannot be traced faithfully; the message names the reason and the line.
    """
    modes = {child: child.training for child in module.modules()}
    try:
        module.train()
        train = _trace(module, given)
        module.eval()
        evaluation = _trace(module, given)
    finally:
        for child, training in modes.items():
            child.training = training
    _share_constants(module, train, evaluation)
    if _text(train) == _text(evaluation):
        return {"both": train}
    return {"train": train, "eval": evaluation}


def _trace(module: nn.Module, given: Mapping[str, object] | None) -> fx.Graph:
    tracer = _Tracer()
    try:
        with _unchanged(module), _traced_factories(tracer):
            graph = tracer.trace(module, concrete_args=_defaults(module, given))
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__}: torch.fx cannot trace forward{_line(error)}: {type(error).__name__}: {error}. "
            "Python control flow on tensor values and opaque arguments are the usual causes; move them out of the "
            "model's forward"
        ) from error
    graph.lint()
    return graph


def _defaults(module: nn.Module, given: Mapping[str, object] | None) -> dict[str, Any]:
    """Arguments of forward that are specialised: those with a default that callers will not pass."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty and parameter.name not in (given or {})
    }


def _line(error: Exception) -> str:
    """Where in the user's code a trace failed: the last frame outside torch and this module."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/torch/" not in f.filename.replace("\\", "/") and f.filename != __file__]
    return f" ({ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line})" if ours else ""


@contextlib.contextmanager
def _traced_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Let tensor factories that depend on traced values or on random numbers become nodes.

    torch's argument parser refuses proxies in factories before any override could see them, hence the patching.
    """
    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_RANDOM_FACTORIES)}

    def traced(function: Callable[..., object], *, always: bool) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            if always or any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    try:
        for name, function in originals.items():
            setattr(torch, name, traced(function, always=name in _RANDOM_FACTORIES))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Undo what running `forward` at trace time did to the module and the random state, and refuse such a trace."""
    attributes = {child: _attributes(child) for child in module.modules()}
    tensors = {child: dict(child._buffers) for child in module.modules()}
    versions = {id(b): b._version for buffers in tensors.values() for b in buffers.values() if b is not None}
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False))
    try:
        yield
        for child, before in attributes.items():
            _refuse_changes(module, child, before, tensors[child], versions)
        if not torch.equal(torch.get_rng_state(), states[0]):
            raise CaptureError(f"{type(module).__name__}: forward draws random numbers that do not become graph nodes")
        same_numpy = str(np.random.get_state(legacy=False)) == str(states[2])
        if random.getstate() != states[1] or not same_numpy:
            raise CaptureError(
                f"{type(module).__name__}: forward uses Python's or NumPy's random numbers; a graph would repeat one "
                "draw forever. Use torch's random functions on the input's device"
            )
    finally:
        for child, before in attributes.items():
            _restore(child, before, tensors[child])
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _attributes(module: nn.Module) -> dict[str, object]:
    """A module's own attributes; dictionaries and lists copied one level deep, since forward may change them."""
    copied = {}
    for key, value in vars(module).items():
        if key not in _TREE:
            copied[key] = type(value)(value) if type(value) in (dict, list, set) else value
    return copied


def _refuse_changes(
    root: nn.Module,
    child: nn.Module,
    before: Mapping[str, object],
    buffers: Mapping[str, Tensor | None],
    versions: Mapping[int, int],
) -> None:
    where = next((name for name, module in root.named_modules() if module is child), "")
    for key, value in _attributes(child).items():
        if key.startswith("_tensor_constant"):
            continue
        if key not in before or not _same(value, before[key]):
            raise CaptureError(
                f"{type(root).__name__}: forward changes the attribute {key!r} of module {where or 'root'!r}; a graph "
                "would not. Register it as a buffer and change it with tensor operations"
            )
    for key, buffer in child._buffers.items():
        same = key in buffers and buffer is buffers[key]
        if not same or (buffer is not None and buffer._version != versions[id(buffer)]):
            raise CaptureError(
                f"{type(root).__name__}: forward writes buffer {key!r} of module {where!r} outside the graph"
            )


def _same(left: object, right: object) -> bool:
    if left is right:
        return True
    if type(left) in (dict, list, set):
        return type(left) is type(right) and repr(left) == repr(right)
    return isinstance(left, int | float | str | bool | tuple) and left == right


def _restore(module: nn.Module, attributes: Mapping[str, object], buffers: Mapping[str, Tensor | None]) -> None:
    for key in [k for k in vars(module) if k not in _TREE and k not in attributes]:
        if not key.startswith("_tensor_constant"):
            delattr(module, key)
    for key, value in attributes.items():
        current = vars(module).get(key)
        container = type(value) in (dict, list, set)
        if (container and not _same(current, value)) or (not container and current is not value):
            vars(module)[key] = value
    same = module._buffers.keys() == buffers.keys()
    if not same or any(module._buffers[key] is not value for key, value in buffers.items()):
        module._buffers.clear()
        module._buffers.update(buffers)


def _share_constants(module: nn.Module, *graphs: fx.Graph) -> None:
    """Tensors that the traces found in Python become buffers of the module, equal ones only once.

    torch.fx leaves them as plain attributes, which `.to()` does not move.
    """
    kept: dict[str, Tensor] = {}
    for graph in graphs:
        for node in graph.nodes:
            target = str(node.target)
            if node.op != "get_attr" or not target.startswith("_tensor_constant"):
                continue
            value = vars(module).get(target, kept.get(target))
            if value is None:
                continue
            twin = next((k for k, v in kept.items() if v.dtype == value.dtype and torch.equal(v, value)), None)
            name = twin or f"fedmef_constant_{len(kept)}"
            kept.setdefault(name, value)
            node.target = name
    for key in [k for k in vars(module) if k.startswith("_tensor_constant")]:
        delattr(module, key)
    for name, value in kept.items():
        module.register_buffer(name, value, persistent=False)


def _text(graph: fx.Graph) -> str:
    return "\n".join(f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)
