"""Sessions of onnxruntime: loading a file or bytes, running a call, and what the runtime made of the graph."""

import contextlib
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from fedmef_fx.errors import ExportError
from fedmef_fx.export.examples import ExampleCall

__all__ = ["Array", "Session", "array_of", "latency_ratio", "open_session"]

Array = NDArray[Any]
_ERRORS_ONLY: Final = 3
_OPTIMIZED: Final = "session.optimized_model_external_initializers"
_TIMED_ROUNDS: Final = 5
_FEWEST_ROUNDS: Final = 2
_TIMED_SECONDS: Final = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """A loaded model.

    Attributes:
        runtime: onnxruntime's session.
        seconds: That it took to create.
        nodes: Nodes of the graph that runs, after onnxruntime has optimized it; None where it was not asked for. Then
            the seconds include writing that graph, as onnxruntime tells it in no other way.
    """

    runtime: Any
    seconds: float
    nodes: int | None = None

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return [value.name for value in self.runtime.get_inputs()]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs, in order."""
        return [value.name for value in self.runtime.get_outputs()]

    def run(self, call: ExampleCall) -> list[Array]:
        """The outputs for a call of the model.

        Raises:
            ExportError: onnxruntime fails, or the file has other inputs.
        """
        inputs, tensors = self.inputs, call.tensors()
        if len(inputs) != len(tensors):
            raise ExportError(
                f"export_onnx: the file has the inputs {inputs}; the example inputs hold {len(tensors)} tensors"
            )
        try:
            feed = {name: array_of(tensor) for name, tensor in zip(inputs, tensors, strict=True)}
            outputs: list[Array] = self.runtime.run(None, feed)
        except Exception as error:  # its exceptions have no other common base
            raise ExportError(f"export_onnx: onnxruntime cannot run the exported model: {error}") from error
        return outputs


def open_session(model: Path | bytes, *, counts_nodes: bool = False) -> Session:
    """Load a file, or a serialized model.

    Args:
        model: The file, or what it holds.
        counts_nodes: Whether to find out how many nodes run.

    Raises:
        ExportError: onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait must not take the processor from the ones of torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    with contextlib.ExitStack() as stack:
        optimized = None
        if counts_nodes:
            optimized = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "optimized.onnx"
            options.optimized_model_filepath = str(optimized)
            # Weights go to another file, which is not read.
            options.add_session_config_entry(f"{_OPTIMIZED}_file_name", "weights")
            options.add_session_config_entry(f"{_OPTIMIZED}_min_size_in_bytes", "1024")
        try:
            start = time.perf_counter()
            runtime = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            seconds = time.perf_counter() - start
        except Exception as error:  # as above
            raise ExportError(
                f"export_onnx: onnxruntime cannot load the exported model: {error}. It has every operator for float32 "
                "and only some for other types: try model.float()"
            ) from error
        return Session(runtime, seconds, None if optimized is None else _nodes_in(optimized))


def _nodes_in(file: Path) -> int:
    return len(onnx.load(file, load_external_data=False).graph.node)


def array_of(tensor: torch.Tensor) -> Array:
    """A tensor as numpy has it."""
    array: Array = tensor.detach().cpu().numpy()
    return array


def latency_ratio(session: Session, other: Session, call: ExampleCall) -> float:
    """How many times longer one session runs than another: minima of runs taken in turns.

    Runs that take long are taken less often: noise is a smaller share of them.
    """
    fastest, spent = [np.inf, np.inf], 0.0
    for number in range(_TIMED_ROUNDS):
        if number >= _FEWEST_ROUNDS and spent > _TIMED_SECONDS:
            break
        for index, one in enumerate((session, other)):
            start = time.perf_counter()
            one.run(call)
            seconds = time.perf_counter() - start
            fastest[index], spent = min(fastest[index], seconds), spent + seconds
    return float(fastest[0] / fastest[1])
