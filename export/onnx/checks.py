"""Checks between the stages of an export: weights that are numbers, masks that hold, BatchNorms that are folded."""

from collections import Counter
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from fedmef_fx.errors import ConfigError, ExportError
from fedmef_fx.export.examples import Examples, result_of
from fedmef_fx.export.results import EVERYTHING
from fedmef_fx.sparse_model.masks import masks
from fedmef_fx.sparse_model.transformation import is_transformed

if TYPE_CHECKING:
    import onnx

__all__ = ["check_finite", "check_folded", "check_graph", "check_masked", "check_runs", "serialized_in_memory"]

_LAYERS: Final = ("Conv", "ConvTranspose")
_CHECKED_IN_MEMORY_BYTES: Final = 2**31 - 2**24  # a protobuf message holds less than 2 GiB


def check_runs(model: nn.Module, examples: Examples) -> list[str]:
    """Find out whether a model runs on its examples and returns what is wanted.

    Returns:
        Notices about results that are left out.

    Raises:
        ConfigError: It does not; the message quotes its error.
    """
    try:
        result = result_of(model, examples.call)
    except Exception as error:
        shapes = ", ".join(f"{t.dtype}{list(t.shape)}" for t in examples.call.tensors())
        raise ConfigError(
            f"export_onnx: {type(model).__name__} itself fails on the example inputs ({shapes}): "
            f"{type(error).__name__}: {error}"
        ) from error
    wanted = examples.wanted
    if (unknown := wanted.unknown(result)) or not wanted.tensors(result):
        names = ", ".join(map(repr, EVERYTHING.names_in(result))) or "a model that returns tensors"
        raise ConfigError(
            f"export_onnx: got outputs={unknown or None}, of which {type(model).__name__} returns no tensor; expected "
            f"some of {names}"
        )
    return [
        f"left out {name}, a {kind}: outputs=[..., {name!r}] writes its tensors"
        for name, kind in wanted.left_out(result).items()
        if wanted.names is None
    ]


def check_finite(model: nn.Module) -> None:
    """Find out whether all weights are numbers.

    Raises:
        ExportError: Some are not; the message names the first such tensor.
    """
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in named:
        # Buffers may hold infinities: attention masks do.
        bad = tensor.isnan() if not isinstance(tensor, nn.Parameter) else ~tensor.isfinite()
        if bad.any():
            raise ExportError(
                f"export_onnx: {name} has {int(bad.sum())} of {tensor.numel()} values that are NaN or infinite; the "
                "training diverged: export an earlier checkpoint, or train with a smaller learning rate"
            )


def check_masked(model: nn.Module, plain: nn.Module) -> None:
    """Find out whether a frozen model is zero wherever the masks are.

    Active weights may be zero as well: those that were grown start there.

    Raises:
        ExportError: A masked weight that is not zero.
    """
    if not is_transformed(model):
        return
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for name, mask in masks(model).items():
        weight = parameters.get(name)
        if weight is not None and weight.shape == mask.shape and bool(weight.detach().masked_fill(mask, 0.0).any()):
            raise ExportError(
                f"export_onnx: {name} is not zero where it is masked; expected zeros from freezing. The weight was "
                "written past its mask: fedmef_fx.set_masks(model, fedmef_fx.masks(model)) zeroes it"
            )


def check_folded(proto: "onnx.ModelProto", *, is_frozen: bool) -> None:
    """Find out whether every BatchNorm that directly follows a convolution was folded into it.

    Args:
        proto: The graph.
        is_frozen: Whether `freeze` made one graph of the model, so that none of these can be left.

    Raises:
        ExportError: One that was not, as the convolution alone reads its weights and nothing else reads its output.
    """
    if not is_frozen:
        return
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    reads = Counter(name for node in graph.node for name in node.input)
    reads.update(value.name for value in graph.output)
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            continue
        layer = makers.get(node.input[0])
        if layer is None or layer.op_type not in _LAYERS or reads[node.input[0]] > 1:
            continue
        if all(name in weights and reads[name] == 1 for name in layer.input[1:] if name):
            raise ExportError(
                f"export_onnx: BatchNormalization {node.name!r} follows {layer.op_type} {layer.name!r} and was not "
                "folded into it; expected none after freezing. This is a bug of fedmef_fx.freeze, please report it"
            )


def serialized_in_memory(proto: "onnx.ModelProto") -> bytes | None:
    """A graph as the bytes that checkers and runtimes read; None where one message cannot hold it."""
    if sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > _CHECKED_IN_MEMORY_BYTES:
        return None
    serialized: bytes = proto.SerializeToString()
    return serialized


def check_graph(proto: "onnx.ModelProto", serialized: bytes | None = None, *, what: str = "exported") -> None:
    """Run onnx's own checker, with shape inference.

    Args:
        proto: The graph.
        serialized: The same as bytes, where they are there already.
        what: Which graph it is, for the error.

    Raises:
        ExportError: It refuses the graph.
    """
    import onnx  # noqa: PLC0415 -- only exports need it

    serialized = serialized_in_memory(proto) if serialized is None else serialized
    if serialized is None:
        return  # too large; onnxruntime checks the file when it loads it
    try:
        onnx.checker.check_model(serialized, full_check=True)
    except Exception as error:  # the checker's and shape inference's errors have no other common base
        raise ExportError(f"export_onnx: onnx refuses the {what} graph: {error}") from error
