"""The tracer that runs each operation on an example call while it records it; see `values.py` for its proxies."""

import operator
from collections.abc import Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from fedmef_fx.capture.part_counts import counts_depend_on_shapes, has_counted_parts
from fedmef_fx.capture.patches import traced_calls
from fedmef_fx.capture.proxies import NumberProxy, TensorProxy, ValueProxy, concrete_value, shown_to_isinstance
from fedmef_fx.capture.state import unchanged
from fedmef_fx.capture.tracer import BaseTracer
from fedmef_fx.errors import CaptureError
from fedmef_fx.graph.compiled import original_forward
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.operators import operator_of
from fedmef_fx.graph.signature import Call

__all__ = ["trace_call"]

_NUMBERS: Final = (int, float)
_METADATA: Final = frozenset(
    {
        "dim",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
        "is_floating_point",
        "is_signed",
        "ndimension",
        "nelement",
        "numel",
        "size",
        "storage_offset",
        "stride",
        "type",
        torch.is_complex,
        torch.is_floating_point,
        torch.numel,
    }
)
"""What tells about a tensor, not about what it contains."""
_OF_KIND: Final = frozenset(
    {
        "dim",
        "dtype",
        "device",
        "element_size",
        "is_complex",
        "is_floating_point",
        "is_cpu",
        "is_cuda",
        "is_nested",
        "is_sparse",
        "layout",
        "ndim",
        "ndimension",
        "type",
        torch.is_complex,
        torch.is_floating_point,
    }
)
"""What all tensors of one dtype, device and rank have in common, which every signature fixes."""


def trace_call(
    module: nn.Module, call: Call, *, concrete_sizes: bool, own_hooks: Collection[int] = ()
) -> tuple[fx.Graph, bool]:
    """Trace a module's forward on one call, in the mode it is in.

    Args:
        module: The module; it is as it was when this returns or raises.
        call: The call; its tensors are not changed.
        concrete_sizes: Whether sizes are plain numbers from the start. Traces more, and always specialises.
        own_hooks: Identities of hooks that the model's own code installed; they are traced.

    Returns:
        The graph, whose placeholders are the call's tensors in order, and whether it holds for their shapes only.

    Raises:
        Exception: Whatever forward raises when it meets a proxy where it needs a value.
    """
    copied = call.replace_tensors(lambda tensor: tensor.detach().clone())
    tracer = ValueTracer(copied, concrete_sizes=concrete_sizes, own_hooks=own_hooks)
    tracer.prepare(module)
    calls = traced_calls(tracer, is_paused=lambda: tracer.executes)
    with unchanged(module, executes=True), calls, shown_to_isinstance():
        graph = tracer.trace(module)
    tracer.erase_unused()
    graph.lint()
    if tracer.counts_parts and not tracer.is_specialized:
        with unchanged(module, executes=True):
            names = _placeholder_names(call)
            return graph, counts_depend_on_shapes(module, graph, dict(zip(names, call.tensors, strict=True)))
    return graph, tracer.is_specialized


class ValueTracer(BaseTracer):
    """Records a forward while running it.

    Attributes:
        is_specialized: Whether Python took a plain number out of a size.
        executes: Whether an operation runs at this moment, in which nothing is recorded.
        counts_parts: Whether Python saw into how many parts a tensor or list fell.
    """

    looks_inside = True

    def __init__(self, call: Call, *, concrete_sizes: bool, own_hooks: Collection[int] = ()) -> None:
        super().__init__(own_hooks=own_hooks)
        self.call = call
        self.concrete_sizes = concrete_sizes
        self.is_specialized = concrete_sizes
        self.executes = False
        self.counts_parts = False
        self._maybe_unused: list[fx.Node] = []

    def specialize(self, proxy: ValueProxy) -> None:
        """Note that the graph now depends on the value behind a proxy.

        Raises:
            CaptureError: That value depends on what tensors contain.
        """
        if proxy.depends_on_data:
            raise CaptureError("forward looks at a size that depends on what tensors contain")
        self.is_specialized = True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """A placeholder per tensor of the call, and forward with the call's arguments."""
        names = iter(_placeholder_names(self.call))
        proxies = self.call.replace_tensors(lambda tensor: self._placeholder(next(names), tensor))
        root = self.root
        assert isinstance(root, nn.Module)  # noqa: S101 -- trace_call passes one

        def forward() -> Any:
            return proxies.on(original_forward(root), root)

        return forward, []

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a module inside forward."""
        return forward(*args, **kwargs) if self.executes else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """An attribute of a module: a node for parameters and buffers, unless an operation runs."""
        return attr_val if self.executes else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Run an operation on the values of its arguments and record it."""
        seen: list[ValueProxy] = []
        values = concrete_value((args, kwargs), on_proxy=seen.append)
        _refuse_unless_numbers(kind, target, values)
        depends = any(proxy.depends_on_data for proxy in seen) or _is_sized_by_data(target, values)
        result = self._execute(kind, target, *values)
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name, type_expr)
        reads = kind != "get_attr" and any(type(proxy) is TensorProxy for proxy in seen)
        if reads and isinstance(result, bool | int | float) and not _is_metadata(target, values):
            raise CaptureError(f"forward reads the value of a traced tensor with {_name(target, values)}")
        self.counts_parts |= has_counted_parts(kind, target, result)
        of_kind = _is_one_of(target, values, _OF_KIND)
        return self._wrap(node, result, depends_on_data=depends, is_fixed=of_kind)

    def erase_unused(self) -> None:
        """Erase the nodes that only told Python about sizes or took results apart."""
        for node in reversed(self._maybe_unused):
            if not node.users:
                self.graph.erase_node(node)

    def _placeholder(self, name: str, tensor: Tensor) -> Any:
        node = self.create_node("placeholder", name, (), {})
        return TensorProxy(node, self, tensor, depends_on_data=False)

    def _execute(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        random_state = torch.get_rng_state()
        self.executes = True
        try:
            with torch.no_grad():
                return self._run(kind, target, args, kwargs)
        finally:
            self.executes = False
            # Python code must not see that random numbers were drawn; the graph will draw them.
            torch.set_rng_state(random_state)

    def _run(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        value: Any = self.root
        for part in str(target).split("."):
            value = getattr(value, part)
        if kind == "get_attr":
            return value
        if not has_user_hooks(value):
            return value(*args, **kwargs)
        # Hooks may set attributes, such as the weight that weight_norm computes; at run time they do so again.
        attributes = dict(vars(value))
        try:
            return value(*args, **kwargs)
        finally:
            vars(value).clear()
            vars(value).update(attributes)

    def _wrap(self, node: fx.Node, value: Any, *, depends_on_data: bool, is_fixed: bool = False) -> Any:
        """What Python sees as the result of a node."""
        if isinstance(value, Tensor):
            return TensorProxy(node, self, value, depends_on_data=depends_on_data)
        if node.target in (getattr, operator.getitem) or isinstance(value, bool | int | float):
            self._maybe_unused.append(node)
        if isinstance(value, tuple | list | dict):
            return self._wrap_parts(node, value, depends_on_data=depends_on_data)
        if is_fixed or value is None or isinstance(value, str | torch.dtype | torch.device | torch.layout):
            return value
        if not isinstance(value, bool | int | float):
            raise CaptureError(f"forward gets a {type(value).__name__} from {node.target}, which no graph can hold")
        proxy = NumberProxy(node, self, value, depends_on_data=depends_on_data)
        if isinstance(value, bool) or self.concrete_sizes:
            self.specialize(proxy)
            return value
        return proxy

    def _wrap_parts(self, node: fx.Node, value: Any, *, depends_on_data: bool) -> Any:
        keys = value.keys() if isinstance(value, dict) else range(len(value))
        parts = {}
        for key in keys:
            part = self.create_node("call_function", operator.getitem, (node, key), {})
            if isinstance(value[key], Tensor):
                self._maybe_unused.append(part)  # the others are noted when they are wrapped
            parts[key] = self._wrap(part, value[key], depends_on_data=depends_on_data)
        if isinstance(value, torch.Size):
            whole = all(type(part) is int for part in parts.values())
            return torch.Size(parts.values()) if whole else tuple(parts.values())
        if isinstance(value, dict):
            return type(value)(parts)
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())


def _placeholder_names(call: Call) -> list[str]:
    """A name per tensor of a call: that of its argument, numbered where an argument holds several."""
    names: list[str] = []
    for argument, value in call.arguments.items():
        number = sum(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(value))
        names += [argument] if number == 1 else [f"{argument}_{index}" for index in range(number)]
    return names


def _is_metadata(target: Any, values: Any) -> bool:
    return target is getattr or _is_one_of(target, values, _METADATA)


def _is_one_of(target: Any, values: Any, names: frozenset[Any]) -> bool:
    if target is getattr:
        return values[0][1] in names
    try:
        return target in names
    except TypeError:
        return False


def _name(target: Any, values: Any) -> str:
    return str(values[0][1]) if target is getattr else str(getattr(target, "__name__", target))


def _refuse_unless_numbers(kind: str, target: Any, values: Any) -> None:
    """Refuse methods that leave the graph: their results are Python's."""
    if kind == "call_method" and target in ("item", "tolist", "numpy", "__array__", "data_ptr", "backward"):
        raise CaptureError(f"forward calls .{target}() on a traced tensor")


def _is_sized_by_data(target: Any, values: Any) -> bool:
    args, kwargs = values
    if target is operator.getitem and isinstance(args[0], Tensor):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in index)
    if target in (torch.where, "where"):
        return len(args) + len(kwargs) == 1
    if target in (torch.repeat_interleave, "repeat_interleave"):
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        return isinstance(repeats, Tensor)
    row = operator_of(target)
    return row is not None and row.is_sized_by_data
