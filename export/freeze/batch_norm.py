"""Fold a BatchNorm into the layer before it.

In eval mode BatchNorm is y = (x - mean) * s + shift per channel, with s = weight / sqrt(var + eps), so that for
x = W * input + b the layer W' = s W, b' = (b - mean) s + shift computes y alone. Zeros of W stay zeros.

Folded is a BatchNorm that directly follows a convolution or linear layer, nothing else reads the values in between,
and the layer's weight is a parameter that nothing else reads: untying a tied weight would make the model larger.
After a linear layer BatchNorm1d counts dimension 1 as channels, which is the layer's last dimension for matrices
only, so its input has to be one provably. The others stay BatchNorms in eval mode.
"""

from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fedmef_fx.export.freeze.weights import add_parameter, readers
from fedmef_fx.graph.nodes import is_layer, is_transposed, operator_at
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.operators import bound
from fedmef_fx.graph.program import Region
from fedmef_fx.ops.nsconv import from_rows, to_rows

__all__ = ["TakenIn", "fold_batch_norms"]


class _Norm(NamedTuple):
    """A BatchNorm in eval mode; each tensor is [channels]."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class TakenIn(NamedTuple):
    """Where a BatchNorm went.

    Attributes:
        layer: Path of the layer that computes it.
        had_bias: Whether that layer had a bias before.
    """

    layer: str
    had_bias: bool


def fold_batch_norms(region: Region, graph: fx.Graph) -> dict[str, TakenIn]:
    """Fold what can be folded, in place.

    Returns:
        Where each BatchNorm went that a module holds, by its path.
    """
    taken = {}
    for node in list(graph.nodes):
        norm = _batch_norm(region, node)
        layer = _input(node) if norm is not None else None
        if norm is not None and layer is not None and _match(region, layer, norm):
            path, had_bias = _path(node), _bias(layer) is not None
            _rewrite(region, layer, norm)
            taken[path] = TakenIn(str(layer.args[1].target).rpartition(".")[0], had_bias)  # type: ignore[union-attr]  # _match has seen a get_attr
            node.replace_all_uses_with(layer)
            graph.erase_node(node)
    return taken


def _path(node: fx.Node) -> str:
    """The module that holds a BatchNorm's tensors."""
    if node.op == "call_module":
        return str(node.target)
    return str(bound(node)["running_mean"].target).rpartition(".")[0]


def _input(node: fx.Node) -> fx.Node | None:
    x = node.args[0] if node.args else node.kwargs.get("input")
    return x if isinstance(x, fx.Node) else None


def _batch_norm(region: Region, node: fx.Node) -> _Norm | None:
    """The BatchNorm that a node applies with running statistics, None for any other node."""
    row, module = operator_at(region, node), region.module(node)
    if row is None or row.kind != "batch_norm":
        return None
    if module is not None:
        hooked = module._forward_hooks or module._forward_pre_hooks
        values: Any = (module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        return None if hooked or values[0] is None or values[1] is None else _Norm(*values)
    given = bound(node)
    optional = [given.get(name) for name in ("weight", "bias")]
    mean, var = (region.tensor(given.get(name)) for name in ("running_mean", "running_var"))
    weight, bias = (region.tensor(value) for value in optional)
    computed = any(value is not None and region.tensor(value) is None for value in optional)
    if given.get("training", False) is not False or mean is None or var is None or computed:
        return None
    return _Norm(mean, var, weight, bias, given.get("eps", 1e-5))


def _match(region: Region, layer: fx.Node, norm: _Norm) -> bool:
    """Whether a layer can take a BatchNorm that follows it."""
    if not is_layer(layer):
        return False
    weight, bias = region.tensor(layer.args[1]), _bias(layer)
    if not isinstance(weight, nn.Parameter) or (bias is not None and region.tensor(bias) is None):
        return False
    if len(layer.users) != 1 or len(readers(region, layer.graph, weight)) != 1:
        return False
    if _channels(layer, weight) != norm.mean.numel():
        return False
    return operation_of(region, layer).kind != "linear" or _is_matrix(region, layer.args[0])


def _bias(layer: fx.Node) -> Any:
    return layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")


def _groups(layer: fx.Node) -> int:
    return int(bound(layer).get("groups", 1)) if is_transposed(layer) else 1


def _channels(layer: fx.Node, weight: Tensor) -> int:
    return weight.shape[1] * _groups(layer) if is_transposed(layer) else weight.shape[0]


def _is_matrix(region: Region, node: object) -> bool:
    """Whether a tensor has two dimensions, as far as the nodes that make it show."""
    while isinstance(node, fx.Node):
        operation = operation_of(region, node)
        name = "" if operation.row is None else operation.row.name
        if name in ("view", "reshape"):
            sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
            return len(sizes) == 2
        if name == "flatten":
            dims = {"start_dim": 0, "end_dim": -1} | operation.options
            return bool(dims["start_dim"] == 1 and dims["end_dim"] == -1)
        if operation.kind not in ("batch_norm", "elementwise", "linear"):
            return False
        node = _input(node)
    return False


def _rewrite(region: Region, layer: fx.Node, norm: _Norm) -> None:
    graph, transposed = layer.graph, is_transposed(layer)
    weight, bias = region.tensor(layer.args[1]), region.tensor(_bias(layer))
    assert weight is not None  # noqa: S101 -- _match has seen it
    # In float64, so that folding adds one rounding and no more.
    scale = (norm.var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()

    rows = to_rows(weight.double(), groups=_groups(layer), transposed=transposed) * scale.unsqueeze(1)
    folded = from_rows(rows, weight.shape, groups=_groups(layer), transposed=transposed)
    new_bias = shift.to(weight.dtype if bias is None else bias.dtype)
    weight.copy_(folded)
    if bias is not None and len(readers(region, graph, bias)) == 1 and bias is not norm.bias:
        bias.copy_(new_bias)
        return
    path = str(layer.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]  # _match has seen a get_attr
    with graph.inserting_before(layer):
        read = graph.get_attr(add_parameter(region, f"{path}.bias" if path else "bias", new_bias))
    layer.args = (*layer.args[:2], read)
    layer.kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
