"""What a graph node does to channels, whether it is a function, a method or a module: one `Operation` per node.

Kinds that keep a tensor's shape are named by what they do to a constant: an "elementwise" operation can be evaluated on
it. What is not listed is "unknown": nothing is assumed about it.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fedmef_fx.graph.activations import activation, rows
from fedmef_fx.graph.nodes import CONVOLUTIONS, bound
from fedmef_fx.graph.program import Region

__all__ = [
    "DROPOUT_MODULES",
    "PRODUCTS",
    "Operation",
    "nonlinearity",
    "operation_of",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """A node, understood.

    Attributes:
        kind: What it does to channels; "unknown" where that is not known.
        x: Its first argument.
        options: What else it depends on, by name.
    """

    kind: str
    x: Any = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_ELEMENTWISE: Final = frozenset(
    {
        "abs",
        "abs_",
        "clamp",
        "clamp_",
        "clamp_max",
        "clamp_min",
        "clone",
        "contiguous",
        "cos",
        "detach",
        "double",
        "erf",
        "exp",
        "expm1",
        "float",
        "half",
        "hardshrink",
        "log1p",
        "logsigmoid",
        "neg",
        "neg_",
        "pow",
        "rsqrt",
        "sin",
        "softshrink",
        "softsign",
        "sqrt",
        "square",
        "tanhshrink",
        "threshold",
        "to",
    }
)
_ELEMENTWISE_MODULES: Final = (
    nn.Hardshrink,
    nn.Identity,
    nn.LogSigmoid,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Threshold,
)
DROPOUT_MODULES: Final = (
    nn.AlphaDropout,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.FeatureAlphaDropout,
)
_DROPOUTS: Final = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d})
_BINARY: Final[dict[Any, str]] = {
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add": "add",
    "add_": "add",
    operator.sub: "sub",
    operator.isub: "sub",
    torch.sub: "sub",
    "sub": "sub",
    "sub_": "sub",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    "mul": "mul",
    "mul_": "mul",
    operator.truediv: "div",
    operator.itruediv: "div",
    torch.div: "div",
    "div": "div",
    "div_": "div",
    torch.maximum: "join",
    torch.minimum: "join",
    operator.pow: "elementwise",
    operator.neg: "elementwise",
}
_METADATA: Final = frozenset(
    {"dim", "ndimension", "numel", "is_contiguous", "get_device", "device", "dtype", "ndim", "is_cuda", "requires_grad"}
)
_BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NAMED: Final[dict[str, str]] = {
    "flatten": "reshape",
    "reshape": "reshape",
    "view": "reshape",
    "unflatten": "reshape",
    "squeeze": "reshape",
    "unsqueeze": "reshape",
    "permute": "permute",
    "transpose": "permute",
    "t": "permute",
    "expand": "expand",
    "cat": "cat",
    "concat": "cat",
    "concatenate": "cat",
    "chunk": "split",
    "split": "split",
    "mean": "mean",
    "sum": "sum",
    "amax": "mean",
    "amin": "mean",
    "softmax": "softmax",
    "log_softmax": "softmax",
    "matmul": "matmul",
    "bmm": "matmul",
    "where": "where",
    "masked_fill": "masked_fill",
    "scaled_dot_product_attention": "attention",
    "batch_norm": "batch_norm",
    "layer_norm": "layer_norm",
    "group_norm": "group_norm",
    "prelu": "prelu",
    "interpolate": "interpolate",
    "pad": "pad",
    "size": "size",
    "unbind": "unbind",
}


def operation_of(region: Region, node: fx.Node) -> Operation:
    """What a node does; see the module docstring."""
    if node.op == "call_module":
        module = region.module(node)
        hooked = module is None or module._forward_hooks or module._forward_pre_hooks
        return Operation("unknown") if hooked or len(node.args) != 1 else _of_module(module, node.args[0])
    if node.op not in ("call_function", "call_method"):
        return Operation(node.op)
    if node.op == "call_function":
        known = _of_function(node)
        if known is not None:
            return known
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _of_name(node, name)


def _of_module(module: Any, x: Any) -> Operation:
    if isinstance(module, (*_ELEMENTWISE_MODULES, *(row.module for row in rows()))):
        return Operation("elementwise", x)
    if isinstance(module, DROPOUT_MODULES):
        return Operation("identity", x)
    if type(module) in _BATCH_NORMS and module.running_mean is not None:
        tensors = {name: getattr(module, name) for name in ("weight", "bias", "running_mean", "running_var")}
        return Operation("batch_norm", x, {**tensors, "eps": module.eps})
    if isinstance(module, nn.Flatten | nn.Unflatten):
        return Operation("reshape" if isinstance(module, nn.Flatten) else "unknown", x)
    if isinstance(module, nn.Embedding) and module.max_norm is None:
        return Operation("embedding", x, {"weight": module.weight})
    if isinstance(module, nn.PReLU):
        return Operation("prelu", x, {"weight": module.weight})
    if isinstance(module, nn.Softmax | nn.LogSoftmax):
        return Operation("softmax", x, {"dim": module.dim})
    if isinstance(module, nn.LayerNorm):
        return Operation("layer_norm", x, {"dims": len(module.normalized_shape)})
    if isinstance(module, nn.GroupNorm):
        return Operation("group_norm", x)
    if isinstance(module, nn.Upsample):
        return Operation("interpolate", x)
    kind = _pooling(type(module).__name__.lower())
    if kind is not None and not getattr(module, "return_indices", False):
        return dataclasses.replace(kind, x=x)
    return Operation("unknown", x)


def _pooling(name: str) -> Operation | None:
    """A pooling by its name without underscores: `maxpool2d`, `adaptiveavgpool1d`."""
    if not name.endswith(("pool1d", "pool2d", "pool3d")) or name.startswith(("lp", "fractional")):
        return None
    exact = name.startswith(("max", "adaptive"))
    return Operation("pool", options={"spatial": int(name[-2]), "keeps_constants": exact})


def _of_function(node: fx.Node) -> Operation | None:
    target: Callable[..., Any] = node.target  # type: ignore[assignment]  # a call_function's target
    if target in CONVOLUTIONS:
        given = bound(node)
        return Operation("conv", given["input"], given)
    if target is F.linear:
        given = bound(node)
        return Operation("linear", given["input"], given)
    if target is F.embedding:
        return Operation("embedding", node.args[0], bound(node))
    if target in _DROPOUTS:
        is_off = bound(node).get("training", True) is False
        return Operation("identity" if is_off else "unknown", bound(node)["input"])
    if target is operator.getitem:
        return Operation("getitem", node.args[0])
    if target is getattr:
        return Operation("size" if node.args[1] == "shape" else "metadata", node.args[0])
    if target is operator.matmul:
        return Operation("matmul", node.args[0], {"other": node.args[1]})
    if target in _BINARY:
        return _binary(node, _BINARY[target])
    return None


def _binary(node: fx.Node, kind: str) -> Operation:
    if kind == "elementwise":
        return Operation(kind, node.args[0])
    if node.kwargs or len(node.args) != 2:
        return Operation(
            "join", options={"operands": tuple(node.all_input_nodes)}
        )  # add(alpha=...), div(rounding_mode=...)
    return Operation(kind, options={"operands": node.args})


def _of_name(node: fx.Node, name: str) -> Operation:
    x = node.args[0] if node.args else node.kwargs.get("input")
    if node.op == "call_method" and node.target in _BINARY:
        return _binary(node, _BINARY[node.target])
    if name in _METADATA:
        return Operation("metadata", x)
    if name in _ELEMENTWISE or name.removesuffix("_") in {row.name for row in rows()}:
        tensors = [argument for argument in node.all_input_nodes if argument is not x]
        return Operation("elementwise" if not tensors else "unknown", x)
    pooling = _pooling(name.replace("_", ""))
    if pooling is not None and not node.kwargs.get("return_indices", False):
        return dataclasses.replace(pooling, x=x)
    kind = _NAMED.get(name, "unknown")
    options: dict[str, Any] = {}
    if kind in ("batch_norm", "layer_norm", "prelu", "attention") and node.op == "call_function":
        options = _signature_options(node, kind)
    elif kind in ("matmul", "masked_fill"):
        options = {"other": node.args[1] if len(node.args) > 1 else None}
    elif kind in ("cat", "split", "mean", "sum", "softmax", "pad", "unbind"):
        options = _dimension(node, kind)
    return Operation(kind, x, options)


def _signature_options(node: fx.Node, kind: str) -> dict[str, Any]:
    if kind == "batch_norm":
        return bound(node)
    if kind == "layer_norm":
        shape = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        return {"dims": len(shape)}  # type: ignore[arg-type]  # a tuple
    names = {"prelu": ("x", "weight"), "attention": ("query", "key", "value", "attn_mask")}[kind]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _dimension(node: fx.Node, kind: str) -> dict[str, Any]:
    names = {
        "cat": ("tensors", "dim"),
        "split": ("input", "size", "dim"),
        "pad": ("input", "pad", "mode", "value"),
    }.get(kind, ("input", "dim", "keepdim"))
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if "axis" in given:
        given["dim"] = given.pop("axis")
    return given


def nonlinearity(region: Region, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
    """The elementwise function a node applies to its first argument, None if it is none that is known.

    The result never works in place, whatever the node does.
    """
    module = region.module(node)
    if module is not None and activation(type(module)) is not None:
        return lambda z: module(z.clone())
    row = activation(node.target) if node.op in ("call_function", "call_method") else None
    if row is not None:
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "input")}
        return lambda z: row.function(z.clone(), *node.args[1:], **kwargs)
    return None


PRODUCTS: Final = frozenset(
    {
        "__matmul__",
        "__rmatmul__",
        "_grouped_mm",
        "addbmm",
        "addmm",
        "baddbmm",
        "bilinear",
        "bmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "einsum",
        "grouped_mm",
        "gru",
        "gru_cell",
        "linear",
        "lstm",
        "lstm_cell",
        "matmul",
        "mm",
        "multi_head_attention_forward",
        "mv",
        "rnn_relu",
        "rnn_relu_cell",
        "rnn_tanh",
        "rnn_tanh_cell",
        "tensordot",
    }
)
"""Names of the functions and methods of torch that multiply a weight with something."""
