"""Capture: from an nn.Module to torch.fx graphs that are right in train and in eval mode, or a clear refusal.

Plain `torch.fx.symbolic_trace` is silently wrong for many real models; this tracer closes the gaps it knows:

1. The trace is made once per mode. Equal traces become one graph; different ones are kept side by side.
2. Buffers are proxied, so `self.num_batches_tracked.add_(1)` is a node and does not happen at trace time.
3. Factories (`torch.zeros`, `torch.rand`, ...) whose arguments are traced values, and all random ones, become nodes.
4. Optional arguments are specialised to their defaults, and the graph asserts that; a proxy is never None.
5. A trace that consumes random numbers, or changes attributes or buffers of the model, is undone and refused.
6. `a += b` writes into a, for others may hold a too.
"""

import inspect
import operator
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.pooling import _AdaptiveMaxPoolNd, _MaxPoolNd

from fedmef_fx.capture.arguments import placeholders
from fedmef_fx.capture.patches import traced_calls
from fedmef_fx.capture.proxies import InPlaceProxy
from fedmef_fx.capture.state import unchanged
from fedmef_fx.capture.tracer import BaseTracer, is_proxy
from fedmef_fx.display.source_names import source_name, with_source_names
from fedmef_fx.errors import CaptureError
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.records.graphs import GraphMode

__all__ = ["as_graphs", "capture_graphs", "failure"]


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
    return as_graphs(module, {"train": train, "eval": evaluation})


def as_graphs(module: nn.Module, graphs: Mapping[GraphMode, fx.Graph]) -> dict[GraphMode, fx.Graph]:
    """The graphs of a module by mode, one where the modes agree; constants that they found become buffers."""
    _share_constants(module, *graphs.values())
    if len(graphs) == 2 and len({_text(graph) for graph in graphs.values()}) == 1:
        return {"both": next(iter(graphs.values()))}
    return dict(graphs)


_Parts = tuple["_Parts | None", ...]


def _parts(module: nn.Module) -> _Parts | None:
    """How the result of a module of torch.nn is made up; None for a tensor, and for what is not known."""
    forward = type(module).forward
    if forward is nn.LSTM.forward:
        return None, (None, None)
    if forward in (nn.RNN.forward, nn.GRU.forward, nn.LSTMCell.forward, nn.MultiheadAttention.forward):
        return None, None
    if isinstance(module, _MaxPoolNd | _AdaptiveMaxPoolNd) and module.return_indices:
        return None, None
    return None


class _SymbolicTracer(BaseTracer):
    """Traces with proxies that know no values.

    Attributes:
        specialized: Values of arguments.
        parts: Nodes that were made before it is known whether anything reads them.
    """

    def __init__(self, specialized: Mapping[str, object]) -> None:
        super().__init__()
        self.specialized = specialized
        self.parts: list[fx.Node] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        return InPlaceProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a module inside forward; what is known to return a tuple does, for `isinstance` to see."""
        result = super().call_module(m, forward, args, kwargs)
        is_call = is_proxy(result) and result.node.op == "call_module" and not has_user_hooks(m)
        parts = _parts(m) if is_call else None
        return result if parts is None else self._taken_apart(result, parts)

    def _taken_apart(self, proxy: fx.Proxy, parts: _Parts) -> Any:
        found = []
        for index, inside in enumerate(parts):
            part = self.create_proxy("call_function", operator.getitem, (proxy, index), {})
            self.parts.append(part.node)
            found.append(part if inside is None else self._taken_apart(part, inside))
        return tuple(found)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Placeholders for the arguments of forward."""
        return placeholders(self, self.root, root_fn, self.specialized)


def _trace(module: nn.Module, given: Mapping[str, object] | None) -> fx.Graph:
    tracer = _SymbolicTracer(_defaults(module, given))
    tracer.prepare(module)
    try:
        with unchanged(module), traced_calls(tracer):
            graph = tracer.trace(module)
    except Exception as error:
        raise failure(module, error) from error
    for node in reversed(tracer.parts):
        if not node.users:
            graph.erase_node(node)
    # Unpickling a GraphModule traces its code again, with a tracer that it makes without arguments.
    graph._tracer_cls = fx.Tracer
    graph.lint()
    return graph


def failure(module: nn.Module, error: Exception) -> CaptureError:
    """Why a module was not captured, as an error that names the line, but no folder of this machine."""
    if isinstance(error, CaptureError):
        reason = str(error)
        if reason.startswith(type(module).__name__):
            return error
    else:
        reason = f"{type(error).__name__}: {error}"
    return CaptureError(f"{_at(module, error)}: {with_source_names(reason)}")


def _at(module: nn.Module, error: Exception) -> str:
    return f"{type(module).__name__}: torch.fx cannot trace forward{_line(error)}"


def _defaults(module: nn.Module, given: Mapping[str, object] | None) -> dict[str, Any]:
    """Arguments of forward that are specialised: those with a default that callers will not pass."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty and parameter.name not in (given or {})
    }


def _line(error: Exception) -> str:
    """Where in the user's code a trace failed: the last frame outside torch and this package."""
    own = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if "/torch/" not in f.filename.replace("\\", "/") and not f.filename.startswith(own)]
    return f" ({source_name(theirs[-1].filename)}:{theirs[-1].lineno}: {theirs[-1].line})" if theirs else ""


def _share_constants(module: nn.Module, *graphs: fx.Graph) -> None:
    """Tensors that the traces found in Python become buffers of the module, equal ones only once.

    torch.fx leaves them as plain attributes, which `.to()` does not move.
    """
    taken = sum(key.startswith("fedmef_constant_") for key in module._buffers)
    kept: dict[str, Tensor] = {}
    for graph in graphs:
        for node in graph.nodes:
            target = str(node.target)
            if node.op != "get_attr" or not target.startswith("_tensor_constant"):
                continue
            value = vars(module).get(target, kept.get(target))
            if value is None:
                continue
            same = next((k for k, v in kept.items() if v.dtype == value.dtype and torch.equal(v, value)), None)
            name = same or f"fedmef_constant_{taken + len(kept)}"
            kept.setdefault(name, value)
            node.target = name
    for key in [k for k in vars(module) if k.startswith("_tensor_constant")]:
        delattr(module, key)
    for name, value in kept.items():
        module.register_buffer(name, value, persistent=False)


def _text(graph: fx.Graph) -> str:
    return "\n".join(f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.nodes)
