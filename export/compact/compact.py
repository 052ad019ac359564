"""Compact: channels that contribute nothing are taken out, so that what is left is small, dense and fast everywhere.

Stages, on a copy
1. A transformed model is frozen; any other model is traced, and its layers become functional calls.
2. One call on examples shows the shapes of all tensors.
3. `_tie_rules` builds the dependency graph of channels, `_constants` follows constants, `_removal` decides and removes.
4. The result is compared with the model on the examples and on random inputs like them, before it is returned.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fedmef_fx.capture import capture_graphs, capture_model
from fedmef_fx.config import Config
from fedmef_fx.errors import CaptureError, ConfigError, ExportError
from fedmef_fx.export.compact.constants import Constants
from fedmef_fx.export.compact.removal import Decision, decide, remove
from fedmef_fx.export.compact.report import CompactLayer, CompactReport
from fedmef_fx.export.compact.tie_rules import tie_channels
from fedmef_fx.export.compact.ties import Ties
from fedmef_fx.export.examples import ExampleCall, Examples, read_examples, run
from fedmef_fx.export.freeze.freeze import frozen_graph
from fedmef_fx.export.freeze.weights import erase_unread
from fedmef_fx.graph.operations import operation_of
from fedmef_fx.graph.program import Program, Region
from fedmef_fx.graph.signature import Call as TracedCall
from fedmef_fx.module_tree import uncompiled_model
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.sparse_model.transformation import Transformation, is_transformed

__all__ = ["compact", "compact_report"]

_REPORT: Final = "compaction"
_SEED: Final = 2
# Relative to the largest magnitude of the output, absolute below 1: without the zeros sums are added in another order,
# which costs some 1e-7 per layer in float32; a channel that was not dead shows up as more.
_TOLERANCE: Final = 1e-5
_HALF_TOLERANCE: Final = 2e-2
# Not the examples' own size: with 1, or the size of another dimension, a reshape could be taken for another one.
_BATCH_SIZE: Final = 3


def compact(
    model: nn.Module, example_inputs: Sequence[Any], *, example_kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """Remove the channels that contribute nothing, with everything that belongs to them.

    Removed are channels whose value is zero, or a constant that the next layer's bias can take over, and channels that
    no layer has a weight for: output and input channels of convolutions and linear layers, groups of grouped
    convolutions, channels of norms, whole heads of attention. Channels that are tied, by a residual sum for instance,
    are removed together or not at all. What cannot be proven stays, and `compact_report` says why.

    Args:
        model: A transformed model, which is frozen first, or any other module. It does not change.
        example_inputs: Positional arguments of one call, as a tuple.
        example_kwargs: Keyword arguments of that call.

    Returns:
        A plain module in eval mode with the outputs of `model.eval()`, up to float rounding. Names of parameters stay,
        their shapes shrink. Container and block modules are not preserved. A model that cannot be traced as one graph
        comes back as a copy, with the reason in its report.

    Raises:
        ConfigError: Example inputs that do not fit the model.
        ExportError: The outputs differ: a bug of the analysis; nothing is returned then.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1:3].zero_(), net[0].bias[1:3].zero_()
        >>> compact(net, (torch.randn(2, 8),)).get_parameter("0.weight").shape
        torch.Size([2, 8])
    """
    model = uncompiled_model(model)
    read_examples(model, example_inputs, example_kwargs, where="compact")
    plain = frozen_graph(model) if is_transformed(model) else copy.deepcopy(model).eval()
    examples = read_examples(plain, example_inputs, example_kwargs, where="compact")
    reference = copy.deepcopy(plain)
    traced = _trace(plain, examples)
    if isinstance(traced, str):
        return _with_report(reference, CompactReport(refusals=((type(model).__name__, traced),)))
    FunctionalizeWeights().run(Program(plain, [traced], Transformation(Config())))
    graph = traced.graph_for(training=False)
    ties = Ties(traced, _observe(traced, graph, examples))
    tie_channels(ties, graph)
    decision = decide(ties)
    refusals = _refusals(ties, decision)
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    remove(ties, decision, graph)
    erase_unread(graph)
    result = fx.GraphModule(traced.owner, graph, class_name=f"Compact{type(model).__name__}").eval()
    difference = _prove(reference, result, examples)
    return _with_report(result, _report(reference, result, examples, shapes, difference, refusals))


def compact_report(model: nn.Module) -> CompactReport:
    """What `compact` did to a model that it returned.

    Raises:
        ConfigError: The model was not made by `compact`.
    """
    values = getattr(model, _REPORT, None)
    if not isinstance(values, dict):
        raise ConfigError(
            f"compact_report: {type(model).__name__} was not made by compact; expected the result of "
            "fedmef_fx.compact(model, example_inputs)"
        )
    return CompactReport.of_dict(values)


def _with_report(model: nn.Module, report: CompactReport) -> nn.Module:
    # Plain values, so that the module can be read where fedmef_fx is not installed.
    setattr(model, _REPORT, report.as_dict())
    return model


def _trace(plain: nn.Module, examples: Examples) -> Region | str:
    """The model as one graph, or why it is none."""
    if isinstance(plain, fx.GraphModule):
        return Region("", plain, {"both": copy.deepcopy(plain.graph)})
    with contextlib.suppress(CaptureError):  # holds for all shapes and arguments
        graphs = capture_graphs(plain)
        return Region("", plain, {"both": graphs.get("both") or graphs["eval"]})
    call = TracedCall.of(plain, examples.call.args, examples.call.kwargs)
    try:
        captured = capture_model(plain, call)
    except CaptureError as error:
        return str(error)
    finally:
        plain.eval()
    for region in captured.regions:
        by_position = all(isinstance(a, Tensor) for a in examples.call.args) and not examples.call.kwargs
        if not region.path and region.has_mode(training=False) and (region.by_name or by_position):
            return Region("", region.owner, {"both": region.graph_for(training=False)})
    reasons = "; ".join(map(str, captured.failures)) or "its parts are called by Python code"
    return f"it cannot be traced as one graph, in which channels could be followed: {reasons}"


class _Observer(fx.Interpreter):
    """Notes the shapes of all values."""

    def __init__(self, owner: nn.Module, graph: fx.Graph) -> None:
        super().__init__(owner, graph=graph)
        self.extra_traceback = False
        self.shapes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.shapes[n] = _shape(value)
        return value


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return [_shape(part) for part in value]
    return None


def _observe(region: Region, graph: fx.Graph, examples: Examples) -> dict[fx.Node, Any]:
    generator = torch.Generator().manual_seed(_SEED)
    try:
        return _shapes_of(region, graph, examples.random(_BATCH_SIZE, generator=generator))
    except Exception:  # whatever the model raises for a batch size that it does not take
        return _shapes_of(region, graph, examples.call)


def _shapes_of(region: Region, graph: fx.Graph, call: ExampleCall) -> dict[fx.Node, Any]:
    observer = _Observer(copy.deepcopy(region.owner), graph)
    placeholders = graph.find_nodes(op="placeholder")
    given = dict(zip((str(node.target) for node in placeholders), call.args, strict=False)) | call.kwargs
    values = [given[str(n.target)] if str(n.target) in given else n.args[0] for n in placeholders]
    with torch.no_grad():
        observer.run(*values)
    return observer.shapes


def _prove(reference: nn.Module, result: nn.Module, examples: Examples) -> float:
    """The largest difference of the outputs; too large a one is an error."""
    generator = torch.Generator().manual_seed(_SEED)
    calls = [examples.call, examples.random(None, generator=generator)]
    calls += [examples.random(_BATCH_SIZE, generator=generator)] if _takes_other_batches(reference, examples) else []
    largest = 0.0
    for call in calls:
        try:
            expected, got = run(reference, call), run(result, call)
        except Exception as error:
            raise ExportError(
                f"compact: the compacted model does not run: {type(error).__name__}: {error}. This is a bug of "
                "compact; please report it with the model"
            ) from error
        if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
            raise ExportError("compact: the compacted model returns other shapes; please report it with the model")
        for left, right in zip(expected, got, strict=True):
            largest = max(largest, _difference(left, right))
    return largest


def _takes_other_batches(model: nn.Module, examples: Examples) -> bool:
    try:
        run(model, examples.random(_BATCH_SIZE, generator=torch.Generator().manual_seed(_SEED)))
    except Exception:  # whatever the model raises
        return False
    return True


def _difference(left: Tensor, right: Tensor) -> float:
    if not left.numel() or not left.is_floating_point():
        return 0.0
    wide_left, wide_right = left.double(), right.double()
    same = (wide_left == wide_right) | (wide_left.isnan() & wide_right.isnan())
    difference = float(torch.where(same, 0.0, wide_left - wide_right).abs().max())
    finite = wide_left[wide_left.isfinite()]
    scale = max(1.0, float(finite.abs().max()) if finite.numel() else 1.0)
    tolerance = (_TOLERANCE if left.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE) * scale
    if not difference <= tolerance:
        raise ExportError(
            f"compact: outputs differ by up to {difference:.3g}; expected at most {tolerance:.3g}. A model that draws "
            "random numbers in eval mode cannot be compacted; otherwise this is a bug: please report it with the model"
        )
    return difference


def _refusals(ties: Ties, decision: Decision) -> tuple[tuple[str, str], ...]:
    """Outputs of layers that are nothing but their bias and stay, counted by reason."""
    found: dict[tuple[str, str], int] = {}
    constants = Constants(ties, decision.gone)
    for node in ties.region.graph_for(training=False).nodes:
        operation = operation_of(ties.region, node)
        weight = ties.region.tensor(operation.options.get("weight"))
        if operation.kind not in ("conv", "linear") or weight is None or int(operation.options.get("groups", 1)) > 1:
            continue
        _, touch = constants.layer(node, operation)
        rows = ties.of(node)[-1 if operation.kind == "linear" else len(ties.of(node)) - weight.dim() + 1]
        for index in np.flatnonzero(~touch.any(1)).tolist():
            reason = "it has one channel" if rows is None else decision.reasons.get(int(rows[index]))
            if reason is not None:
                where = str(operation.options["weight"].target)
                found[where, reason] = found.get((where, reason), 0) + 1
    return tuple((where, f"{count} dead channels stay: {reason}") for (where, reason), count in found.items())


def _report(
    reference: nn.Module,
    result: nn.Module,
    examples: Examples,
    shapes: dict[str, tuple[int, ...]],
    difference: float,
    refusals: tuple[tuple[str, str], ...],
) -> CompactReport:
    after = {name: tuple(parameter.shape) for name, parameter in result.named_parameters()}
    return CompactReport(
        layers=tuple(
            CompactLayer(name, shape, after[name]) for name, shape in shapes.items() if len(shape) > 1 and name in after
        ),
        parameters_before=sum(parameter.numel() for parameter in reference.parameters()),
        parameters_after=sum(parameter.numel() for parameter in result.parameters()),
        flops_before=_flops(reference, examples),
        flops_after=_flops(result, examples),
        max_abs=difference,
        refusals=refusals,
    )


def _flops(model: nn.Module, examples: Examples) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, examples.call)
    return int(counter.get_total_flops())
