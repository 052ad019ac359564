"""Bisect: where a file and its model begin to differ.

The stages are taken apart from the front: the frozen model against the model, then the translated graph against the
traced program, value by value in the order in which they are computed (they have the same names), then storage.
"""

import copy

import numpy as np
import torch
from onnx import ModelProto, ValueInfoProto
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.export.examples import ExampleCall, run
from fedmef_fx.export.onnx.build import Built
from fedmef_fx.export.onnx.convert import Converted
from fedmef_fx.export.onnx.parity import FLOAT32_TOLERANCE, OutputMismatchError
from fedmef_fx.export.onnx.sessions import Array, array_of, open_session

__all__ = ["explain", "first_difference"]

_RANDOM = "A model that draws random numbers in eval mode cannot be compared: verify=False"


def explain(mismatch: OutputMismatchError, model: nn.Module, converted: Converted, built: Built) -> str:
    """Say in a sentence where a difference begins.

    Args:
        mismatch: With the call that shows it.
        model: In float32.
        converted: The model as a program and as a graph, not yet stripped.
        built: The graph with plain names.
    """
    call = mismatch.call
    assert call is not None  # noqa: S101 -- check_parity sets it
    expected, again = (run(model, call, converted.examples.wanted) for _ in range(2))
    if any(not torch.equal(left, right) for left, right in zip(expected, again, strict=True)):
        return f"The model itself returns something else each time it is called. {_RANDOM}"
    try:
        values = _program_values(converted.program, call)
        first = first_difference(built.plain, values, call)
    except Exception as error:  # whatever fails here, the mismatch itself is what has to be told
        return f"Where it begins could not be found out: {type(error).__name__}: {error}"
    if first is not None:
        return f"The first node that differs is {first}"
    if built.tolerance is None or built.manifest.tensors:
        return "No node differs before weights are quantized and encoded: their rounding is the cause"
    return "No node differs between the traced program and its translation: freezing or tracing changed the model"


def first_difference(graph: ModelProto, values: dict[str, Tensor], call: ExampleCall) -> str | None:
    """The first node of a graph whose output differs from the program's value of the same name; None if none does."""
    shown = copy.deepcopy(graph)
    shown_names = {value.name for value in shown.graph.output}
    names = [name for node in shown.graph.node for name in node.output if name in values]
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in shown_names)
    session = open_session(shown.SerializeToString())
    outputs = dict(zip(session.outputs, session.run(call), strict=True))
    for node in shown.graph.node:
        for name in node.output:
            if name in values and _differ(array_of(values[name]), outputs[name]):
                error = _largest(array_of(values[name]), outputs[name])
                return f"{node.op_type} {node.name!r}, which computes {name!r}: {error}"
    return None


def _program_values(program: torch.export.ExportedProgram, call: ExampleCall) -> dict[str, Tensor]:
    """Every tensor that a program computes, by the name of its node."""
    recorded: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                recorded[n.name] = result.detach().clone()
            return result

    module = program.module()
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (call.args, call.kwargs))
    assert isinstance(module, fx.GraphModule)  # noqa: S101 -- for the type checker
    flat = pytree.tree_leaves((args, kwargs))
    with torch.no_grad():
        Recorder(module).run(*[leaf for leaf in flat if isinstance(leaf, Tensor)])
    return recorded


def _differ(expected: Array, got: Array) -> bool:
    if expected.shape != got.shape:
        return True
    if not np.issubdtype(expected.dtype, np.floating):
        return not np.array_equal(expected, got)
    finite = np.abs(expected[np.isfinite(expected)])
    scale = max(1.0, float(finite.max(initial=0.0)))
    return not np.allclose(expected, got, rtol=0.0, atol=FLOAT32_TOLERANCE * scale, equal_nan=True)


def _largest(expected: Array, got: Array) -> str:
    if expected.shape != got.shape:
        return f"shape {list(got.shape)} in place of {list(expected.shape)}"
    if not np.issubdtype(expected.dtype, np.floating):
        return f"{int((expected != got).sum())} of {got.size} elements differ"
    return f"max abs error {float(np.nanmax(np.abs(expected.astype(np.float64) - got))):.3g}"
