"""Convert: from an inference module to an ONNX graph, through torch's dynamo-based exporter."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any, Final

import onnx
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fedmef_fx.display.source_names import source_name, with_source_names
from fedmef_fx.errors import ExportError
from fedmef_fx.export.examples import ExampleCall, Examples, evaluating
from fedmef_fx.export.onnx.attention import FourDimensionalAttention
from fedmef_fx.export.onnx.dropout import IdleDropoutIsInput
from fedmef_fx.export.onnx.possible_sizes import changed_sizes, possible_sizes
from fedmef_fx.export.results import Wanted, output_name

__all__ = ["Converted", "convert"]

_EXPORTER_LOG: Final = "torch.onnx._internal.exporter"
_SEED: Final = 0
_REMEDIES: Final = {
    # Mixtures of experts of transformers compute their products in groups; this other way has a form.
    "grouped_mm_fallback": "export after model.set_experts_implementation('batched_mm'), set before transform()",
}
_TRIES: Final = 5  # of tracing with other sizes that vary


@dataclasses.dataclass(frozen=True, slots=True)
class Converted:
    """A model in ONNX.

    Attributes:
        proto: The ONNX model.
        program: What it was translated from, operator by operator: values of both have the same names.
        examples: Its example inputs, of which only sizes vary that may vary in the graph.
        is_dynamic: Whether any size varies.
        notices: What was done otherwise than asked for.
    """

    proto: onnx.ModelProto
    program: torch.export.ExportedProgram
    examples: Examples
    is_dynamic: bool
    notices: tuple[str, ...] = ()


def convert(model: nn.Module, examples: Examples, *, dynamic_batch: bool, optimize: bool = True) -> Converted:
    """Trace a model and translate it.

    Args:
        model: Runs in eval mode here; its modes are as they were afterwards.
        examples: Its example inputs.
        dynamic_batch: Whether the batch size may vary. Where that is impossible it is fixed, with a notice.
        optimize: Whether onnxscript simplifies the graph.

    Returns:
        The model, and what it was made from.

    Raises:
        ExportError: Tracing or translating failed; the message names the operator or the reason.
    """
    wants = [examples, dataclasses.replace(examples, sizes={})] if examples.sizes else [examples]
    if not dynamic_batch or examples.batch_size is None:
        wants = [dataclasses.replace(want, batch_size=None) for want in wants if want.sizes]
    notices: list[str] = []
    if dynamic_batch and examples.batch_size is None:
        notices.append("fixed sizes: the first example input has no dimensions, so there is no batch dimension")
    for want in wants:
        try:
            converted = _in_possible_sizes(model, want, optimize=optimize)
        except ExportError as error:
            reason = str(error).removeprefix("export_onnx: ")
            fixed = [f"batch size {want.batch_size}"] if not want.sizes else sorted(_size_names(want))
            notices.append(f"fixed {', '.join(fixed)}, as a varying one fails: {reason}")
        else:
            return dataclasses.replace(converted, notices=(*notices, *changed_sizes(want, converted.examples)))
    converted = _convert(model, examples, examples.call, dynamic=False, optimize=optimize)
    return dataclasses.replace(converted, notices=tuple(notices))


def _size_names(examples: Examples) -> set[str]:
    return {size.name for dims in examples.sizes.values() for size in dims.values()}


def _in_possible_sizes(model: nn.Module, want: Examples, *, optimize: bool) -> Converted:
    """Trace and translate with the sizes that vary, or with what torch.export lets vary of them.

    Raises:
        ExportError: What failed with the sizes as they were wanted.
    """
    tries, tried = [want], [want.sizes]
    first: ExportError | None = None
    while tries:
        examples = tries.pop(0)
        try:
            return _convert(model, examples, _traced_call(examples), dynamic=True, optimize=optimize)
        except ExportError as error:
            first = first or error
            tries = possible_sizes(model, examples, str(error.__cause__)) if len(tried) < _TRIES else tries
            tries = [other for other in tries if other.sizes not in tried]
            tried += [other.sizes for other in tries[:1]]
    assert first is not None  # noqa: S101 -- the first try is always made
    raise first


def _traced_call(examples: Examples) -> ExampleCall:
    # torch.export takes sizes 0 and 1 for constants.
    batch_size = None if examples.batch_size is None else max(examples.batch_size, 2)
    return examples.random(batch_size, generator=torch.Generator().manual_seed(_SEED), traced=True)


def _convert(model: nn.Module, examples: Examples, call: ExampleCall, *, dynamic: bool, optimize: bool) -> Converted:
    # Two inputs that are one tensor would become one input.
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (call.args, call.kwargs))
    shapes = examples.dynamic_shapes() if dynamic else None
    with evaluating(model), _returning_containers(model, examples.wanted) as traced, torch.no_grad(), _quiet():
        try:
            with FourDimensionalAttention(), IdleDropoutIsInput():
                exported = torch.export.export(traced, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # whatever Python in the model's forward raises
            raise ExportError(
                f"export_onnx: torch.export cannot trace {type(model).__name__}: {_reason(error)}. Control flow that "
                "depends on tensor values is the usual cause"
            ) from error
        names = _output_names(exported)
        try:
            program = torch.onnx.export(exported, dynamo=True, verbose=False, output_names=names, optimize=optimize)
        except Exception as error:
            failure = _translation_failure(error, exported)
            raise ExportError(f"export_onnx: {type(model).__name__}: {failure}") from error
    if program is None or program.exported_program is None:
        raise ExportError(f"export_onnx: {type(model).__name__}: torch.onnx returned no model")
    if (constant := constant_size(program.exported_program)) is not None:
        raise ExportError(f"export_onnx: {type(model).__name__}: torch.onnx made {constant}")
    return Converted(program.model_proto, program.exported_program, examples, dynamic)


def constant_size(program: torch.export.ExportedProgram) -> str | None:
    """A size that was to vary and became a number, as the length of an LSTM does in torch 2.15; None: there is none."""
    inputs = {name for name in program.graph_signature.user_inputs if isinstance(name, str)}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name not in inputs or not isinstance(value, Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_number:
                return f"size {dim} of {node.name!r} the constant {size.node.expr}"
    return None


@contextlib.contextmanager
def _returning_containers(model: nn.Module, wanted: Wanted) -> Iterator[nn.Module]:
    """A model that returns containers that torch.export knows, of the tensors that are wanted."""
    if isinstance(model, fx.GraphModule):
        yield _with_containers(model, wanted)  # torch.export interprets its graph
        return
    original = model.forward
    is_own = "forward" in vars(model)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wanted.containers(original(*args, **kwargs))

    vars(model)["forward"] = forward
    try:
        yield model
    finally:
        if is_own:
            vars(model)["forward"] = original
        else:
            del vars(model)["forward"]


def _with_containers(model: fx.GraphModule, wanted: Wanted) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_function(wanted.containers, (graph.graph_copy(model.graph, {}),)))
    graph.set_codegen(model.graph._codegen)
    return fx.GraphModule(model, graph, type(model).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says about its own inner workings; errors still show."""
    logger = logging.getLogger(_EXPORTER_LOG)
    level = logger.level
    logger.setLevel(logging.ERROR)  # that torchvision is not installed, that None is no output, ...
    try:
        with warnings.catch_warnings():
            # torch's exporter uses what torch itself has deprecated.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            warnings.filterwarnings("ignore", message="_check_is_size will be removed", category=FutureWarning)
            # nn.LSTM and its kind keep a list of their parameters, which are registered all the same.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes? self\.\S*_flat_weights", category=UserWarning
            )
            yield
    finally:
        logger.setLevel(level)


def _output_names(exported: torch.export.ExportedProgram) -> list[str]:
    """Names of the tensors that a model returns, from where they stand in its result: dictionary keys, positions."""
    returned = exported.graph_signature.user_outputs
    spec = exported.call_spec.out_spec
    assert spec is not None  # noqa: S101 -- an export always has one
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(returned), spec))
    taken = {str(name) for name in exported.graph_signature.user_inputs}
    tensors = {node.name for node in exported.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    names = []
    for path, value in paths:
        if value not in tensors:
            continue  # a constant, which is no output of the graph
        name = output_name(path)
        while name in taken:
            name += "_out"
        taken.add(name)
        names.append(name)
    return names


def _reason(error: BaseException) -> str:
    """The line of a long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    return with_source_names((listed or lines or [type(error).__name__])[0])


def _translation_failure(error: BaseException, exported: torch.export.ExportedProgram) -> str:
    """What the exporter could not translate: operator, node and source line, where its messages name them."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    operator = re.search(r"No ONNX function found for \S*op='([^']+)'", "\n".join(chain))
    node = re.search(r"Error when translating node %(\w+)", "\n".join(chain))
    where = f" (node {node[1]}{_source_of(node[1], exported)})" if node else ""
    if operator:
        remedy = _REMEDIES.get(operator[1].split(".")[-1], "replace it in the model by operators that have one")
        return f"operator {operator[1]}{where} has no ONNX form; {remedy}"
    reason = chain[-1].strip().splitlines() or [repr(error)]
    return f"torch.onnx cannot translate it{where}: {with_source_names(reason[0])}"


def _source_of(name: str, exported: torch.export.ExportedProgram) -> str:
    """`, model.py:12: return torch.bessel(x)`: the line of the model's code that made a node; empty if unknown."""
    # The exporter splits operators into simpler ones, often of a similar name, before it translates them.
    operator = re.sub(r"_\d+$", "", name)
    nodes = sorted(exported.graph.nodes, key=lambda node: node.name != name)
    trace = next((node.meta.get("stack_trace") for node in nodes if operator in node.name), None)
    frames = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', trace or "")
    own = [frame for frame in frames if f"{os.sep}torch{os.sep}nn{os.sep}" not in frame[0]]
    if not own:
        return ""
    file, line, code = own[-1]
    return f", {source_name(file)}:{line}: {code.strip()}"
