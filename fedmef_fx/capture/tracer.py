"""The tracer that all captures share: torch.fx's, with its known gaps closed.

1. Buffers are proxied, so `self.num_batches_tracked.add_(1)` is a node and does not happen at trace time.
2. Modules with hooks of the user stay calls, so that their hooks run; modules made inside forward are traced through.
3. Blocks without gradients (`torch.no_grad()`) become pairs of nodes.
4. Modules that other threads run meanwhile run as usual: torch.fx replaces `nn.Module.__call__` for all of them.
"""

import math
import threading
from collections.abc import Collection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedmef_fx.capture.rebuild import Rebuild
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.operators import operator_of
from fedmef_fx.ops.grad_mode import enter_grad_mode, leave_grad_mode

__all__ = ["BaseTracer", "is_composite", "is_proxy"]


def is_composite(module: nn.Module) -> bool:
    """Whether a module of torch.nn computes with tensor functions only; tracers that know values look inside."""
    row = operator_of(type(module))
    return row is not None and row.is_composite


def is_proxy(value: object) -> bool:
    """Whether a value stands for one that the graph computes, regardless of the class it shows to `isinstance`."""
    return issubclass(type(value), fx.Proxy)


class BaseTracer(fx.Tracer):
    """The tracer of this module; see the module docstring for what it does beyond torch.fx.

    Attributes:
        looks_inside: Whether the composite modules of torch.nn (attention, transformer layers) are traced through.

    Args:
        own_hooks: Identities of hooks that count as a part of the model.
        autowrap_modules: Modules whose functions take proxies while a trace goes on.
    """

    proxy_buffer_attributes = True
    looks_inside = False

    def __init__(self, *, own_hooks: Collection[int] = (), autowrap_modules: tuple[ModuleType, ...] = (math,)) -> None:
        super().__init__(autowrap_modules=autowrap_modules)  # type: ignore[arg-type]  # torch means any number of them
        self._own_hooks = own_hooks
        self._thread = threading.get_ident()
        self._names: dict[int, str] = {}
        self._grad_is_enabled = True
        self._scopes: list[fx.Node] = []

    def prepare(self, root: nn.Module) -> None:
        """Look up the names of parameters and buffers once; torch.fx searches them at each access."""
        named = [*root.named_buffers(), *root.named_parameters()]
        self._names = {id(tensor): name for name, tensor in named}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays a call."""
        if has_user_hooks(m, besides=self._own_hooks) or isinstance(m, fx.GraphModule):
            return True
        if self.looks_inside and (is_composite(m) or type(m).__module__.startswith("torch.nn.utils.")):
            return False
        row = operator_of(type(m))
        return (row is not None and type(m) in row.modules) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a module inside forward."""
        is_foreign = self.submodule_paths is not None and m not in self.submodule_paths
        if is_foreign or threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """An attribute of a module: a node for parameters and buffers."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None or threading.get_ident() != self._thread:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """A value as the argument of a node."""
        if is_proxy(a):
            return a.node
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        rebuild = Rebuild.of(a)
        if rebuild is not None:
            return self.create_node("call_function", rebuild, tuple(map(self.create_arg, rebuild.holes_of(a))), {})
        return super().create_arg(a)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """Insert a node, and before it what changes the recording of gradients since the last one."""
        if kind not in ("placeholder", "get_attr"):
            self._follow_grad_mode()
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def _follow_grad_mode(self) -> None:
        enabled = torch.is_grad_enabled()
        if enabled == self._grad_is_enabled:
            return
        self._grad_is_enabled = enabled
        if self._scopes and enabled:
            self.graph.create_node("call_function", leave_grad_mode, (self._scopes.pop(),))
        else:
            self._scopes.append(self.graph.create_node("call_function", enter_grad_mode, (enabled,)))
