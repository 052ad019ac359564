"""Which nodes `compress-saved` rewrites, into what, and which of their tensors backward needs.

Decides only; `passes/compress_saved.py` rewrites.
"""

import dataclasses
import operator
from collections.abc import Callable, Collection
from typing import Any, Final

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedmef_fx.graph.activations import Activation, activation
from fedmef_fx.graph.hooks import has_user_hooks
from fedmef_fx.graph.nodes import bound, is_inplace, owns_input
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.norms import compressed_batch_norm, compressed_batch_norm_module, compressed_norm
from fedmef_fx.ops.products import compressed_attention, compressed_matmul, compressed_mul
from fedmef_fx.ops.smooth import compressed_activation, compressed_result

__all__ = ["Compression", "compression_of"]

Handles = tuple[fx.Node | None, ...]


@dataclasses.dataclass(frozen=True)
class Compression:
    """What takes a node's place.

    Attributes:
        op: The runtime op.
        operands: The activations that its backward needs; the op takes a handle for each.
        call: From the handles of the operands to the op's arguments.
        options: Its keyword arguments.
        keeps_result: Whether backward needs the result instead, so that the op returns it with its handle.
        module: Target of a module that the op takes, by `get_attr`, after its handles; None for none.
        parameters: Targets of the module's tensors that it takes by `get_attr`; None stands for an absent one.
    """

    op: Callable[..., Any]
    operands: tuple[Any, ...]
    call: Callable[[Handles], tuple[Any, ...]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    keeps_result: bool = False
    module: str | None = None
    parameters: tuple[str | None, ...] = ()


_ACTIVATIONS: Final[dict[Any, tuple[str, tuple[str, ...]]]] = {
    operator.pow: ("pow", ("input", "exponent")),
    torch.pow: ("pow", ("input", "exponent")),
    torch.square: ("square", ("input",)),
    "pow": ("pow", ("input", "exponent")),
    "square": ("square", ("input",)),
}
_SOFTMAX: Final = ("input", "dim", "dtype")
_PYTHON_SOFTMAX: Final = ("input", "dim", "_stacklevel", "dtype")
_RESULTS: Final[dict[Any, tuple[str, tuple[str, ...]]]] = {
    F.log_softmax: ("log_softmax", _PYTHON_SOFTMAX),
    F.softmax: ("softmax", _PYTHON_SOFTMAX),
    torch.log_softmax: ("log_softmax", _SOFTMAX),
    torch.softmax: ("softmax", _SOFTMAX),
    "log_softmax": ("log_softmax", _SOFTMAX),
    "softmax": ("softmax", _SOFTMAX),
}
_RESULT_MODULES: Final[dict[type[nn.Module], str]] = {
    nn.LogSoftmax: "log_softmax",
    nn.Softmax: "softmax",
}
_NORMS: Final[dict[Any, tuple[str, str]]] = {
    F.group_norm: ("group_norm", "num_groups"),
    F.layer_norm: ("layer_norm", "normalized_shape"),
    F.rms_norm: ("rms_norm", "normalized_shape"),
}
_SIZE_OPTION: Final = {"num_groups": "groups", "normalized_shape": "shape"}
_NORM_MODULES: Final[dict[type[nn.Module], tuple[str, str]]] = {
    nn.GroupNorm: ("group_norm", "num_groups"),
    nn.LayerNorm: ("layer_norm", "normalized_shape"),
    nn.RMSNorm: ("rms_norm", "normalized_shape"),
}
_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE_NORMS: Final = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_MULTIPLICATIONS: Final = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_MATRIX_PRODUCTS: Final = (operator.matmul, torch.matmul, torch.bmm, torch.mm, "matmul", "bmm", "mm")
_ATTENTION: Final = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
    "scale",
    "enable_gqa",
)


def compression_of(region: Region, node: fx.Node, carriers: Collection[fx.Node]) -> Compression | str | None:
    """What takes a node's place; why nothing does, where something could; None for any other node.

    Args:
        region: The region of the graph.
        node: The node.
        carriers: The nodes of the graph whose values carry gradients.
    """
    module = region.module(node)
    if module is None and node.op not in ("call_function", "call_method"):
        return None
    found = _match_function(node, carriers) if module is None else _match_module(node, module)
    if not isinstance(found, Compression):
        return found
    if module is not None and (has_user_hooks(module) or nn.utils.parametrize.is_parametrized(module)):
        return "it has hooks or parametrizations, which need the module call"
    if is_inplace(region, node) and not owns_input(region, node):
        return "it works in place on a tensor with other users"
    return found


def _match_module(node: fx.Node, module: nn.Module) -> Compression | str | None:
    kind, path = type(module), str(node.target)
    if len(node.all_input_nodes) != 1:
        return None
    x = node.all_input_nodes[0]
    row = activation(kind)
    if row is not None:
        return _of_row(row, x, {name: getattr(module, name) for name in row.options})
    if kind in _RESULT_MODULES:
        function = _RESULT_MODULES[kind]
        return _result(x, function, {"dim": module.dim})
    if kind in _NORM_MODULES:
        function, size = _NORM_MODULES[kind]
        value = getattr(module, size)
        options = {"function": function, _SIZE_OPTION[size]: value, "eps": module.eps}
        return _norm(x, options, parameters=norm_tensors(module, path))
    if kind in _INSTANCE_NORMS:
        if module.running_mean is not None:
            return "it tracks statistics of the batch"
        options = {"function": "instance_norm", "eps": module.eps}
        return _norm(x, options, parameters=norm_tensors(module, path))
    if kind in _BATCH_NORMS:
        return Compression(compressed_batch_norm_module, (x,), lambda kept: (x, kept[0]), module=path)
    return None


def norm_tensors(module: nn.Module, path: str) -> tuple[str | None, ...]:
    return tuple(None if getattr(module, name, None) is None else f"{path}.{name}" for name in ("weight", "bias"))


def _match_function(node: fx.Node, carriers: Collection[fx.Node]) -> Compression | str | None:
    target = node.target
    row = activation(target)
    if row is not None:
        return _of_row(row, node.all_input_nodes[0], _options(node, row.signature)) if node.all_input_nodes else None
    if target in _ACTIVATIONS:
        function, names = _ACTIVATIONS[target]
        options = _options(node, names)
        return _activation(node.all_input_nodes[0], function, options) if node.all_input_nodes else None
    if target in _RESULTS:
        function, names = _RESULTS[target]
        return _result(node.all_input_nodes[0], function, _options(node, names)) if node.all_input_nodes else None
    if target in _NORMS:
        return _match_norm(node)
    if target is F.batch_norm:
        return _match_batch_norm(node)
    if target in _MULTIPLICATIONS or target in _MATRIX_PRODUCTS or target is torch.addmm:
        return _match_product(node, carriers)
    return _match_attention(node, carriers) if target is F.scaled_dot_product_attention else None


def _options(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {name: value for name, value in given.items() if name not in ("input", "self", "inplace", "_stacklevel")}


def _is_static(options: dict[str, Any]) -> bool:
    return not any(isinstance(value, fx.Node) for value in options.values())


def _of_row(row: Activation, x: fx.Node, options: dict[str, Any]) -> Compression | str | None:
    if not row.in_8_bits:
        return None
    return (_result if row.keeps == "output" else _activation)(x, row.name, options)


def _activation(x: fx.Node, function: str, options: dict[str, Any]) -> Compression | str | None:
    if not _is_static(options):
        return "its options are computed at run time"
    if function == "pow" and options.get("exponent") not in (2, 3):
        return None  # roots and poles, near which 8 bits are not enough
    return Compression(compressed_activation, (x,), lambda kept: (x, kept[0]), {"function": function, **options})


def _result(x: fx.Node, function: str, options: dict[str, Any]) -> Compression | str | None:
    options = {name: value for name, value in options.items() if value is not None}
    if "softmax" in function and not isinstance(options.get("dim"), int):
        return "its dimension is not given"
    if not _is_static(options):
        return "its options are computed at run time"
    return Compression(compressed_result, (), lambda _: (x,), {"function": function, **options}, keeps_result=True)


def _norm(
    x: fx.Node, options: dict[str, Any], *, tensors: tuple[Any, ...] = (), parameters: tuple[str | None, ...] = ()
) -> Compression:
    return Compression(compressed_norm, (x,), lambda kept: (x, kept[0], *tensors), options, parameters=parameters)


def _match_norm(node: fx.Node) -> Compression | str:
    function, size = _NORMS[node.target]
    given = bound(node)
    default = None if function == "rms_norm" else 1e-5
    options = {"function": function, _SIZE_OPTION[size]: given[size], "eps": given.get("eps", default)}
    if not _is_static(options):
        return "its options are computed at run time"
    return _norm(given["input"], options, tensors=(given.get("weight"), given.get("bias")))


def _match_batch_norm(node: fx.Node) -> Compression | str:
    given = bound(node)
    x = given["input"]
    options = {"training": given.get("training", False), "eps": given.get("eps", 1e-5)}
    options["momentum"] = given.get("momentum", 0.1)
    if not _is_static(options) or options["momentum"] is None:
        return "its options are computed at run time"
    statistics = tuple(given.get(name) for name in ("running_mean", "running_var", "weight", "bias"))
    return Compression(compressed_batch_norm, (x,), lambda kept: (x, kept[0], *statistics), options)


def _match_product(node: fx.Node, carriers: Collection[fx.Node]) -> Compression | None:
    bias: tuple[Any, ...] = ()
    operands = node.args
    if node.target is torch.addmm:
        bias, operands = node.args[:1], node.args[1:]
    if len(operands) != 2 or node.kwargs or not all(isinstance(o, fx.Node) for o in operands):
        return None
    a, b = operands
    # Operands without a gradient (masks, sizes) are kept as they are: they are small, or no floats.
    wanted = tuple(x if x in carriers and other in carriers else None for x, other in ((a, b), (b, a)))
    op = compressed_mul if node.target in _MULTIPLICATIONS else compressed_matmul
    return Compression(op, wanted, lambda kept: (a, kept[0], b, kept[1], *bias)) if any(wanted) else None


def _match_attention(node: fx.Node, carriers: Collection[fx.Node]) -> Compression | str:
    given = {**dict(zip(_ATTENTION, node.args, strict=False)), **node.kwargs}
    q, k, v = (given.pop(name) for name in _ATTENTION[:3])
    mask = given.pop("attn_mask", None)
    if not _is_static(given):
        return "its options are computed at run time"
    if not any(x in carriers for x in (q, k, v)):
        return "no gradient passes through it"
    return Compression(compressed_attention, (q, k, v), lambda kept: (q, kept[0], k, kept[1], v, kept[2], mask), given)
