"""Parity: the written file, run by onnxruntime, against the model it was made from, run by torch."""

import dataclasses
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmef_fx.errors import ExportError
from fedmef_fx.export._examples import Call, Examples, run
from fedmef_fx.export.report import Parity

__all__ = ["check_parity"]

# Relative to the largest magnitude of the output, and absolute below 1: two runtimes add up in different orders, which
# a deep network in float32 amplifies to some 1e-6; an error in the graph is larger by orders of magnitude.
_TOLERANCE: Final = 1e-4
_HALF_TOLERANCE: Final = 2e-2
_BATCH_SIZES: Final = (1, 2, 3)
_SEED: Final = 1
_ERRORS_ONLY: Final = 3

_Array = NDArray[Any]


@dataclasses.dataclass(slots=True)
class _Tally:
    """Differences so far."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    same_rows: int = 0
    rows: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)

    def compare(self, name: str, expected: _Array, got: _Array, *, batch_size: int) -> None:
        """Add the differences of one output.

        Raises:
            ExportError: They are larger than rounding explains.
        """
        where = f"export_onnx: output {name!r} with batch size {batch_size}"
        if expected.shape != got.shape or expected.dtype != got.dtype:
            raise ExportError(
                f"{where}: onnxruntime returns {got.dtype}{list(got.shape)}, torch {expected.dtype}"
                f"{list(expected.shape)}; a batch size that the model fixes needs dynamic_batch=False"
            )
        if expected.size == 0:
            return
        if not np.issubdtype(expected.dtype, np.inexact):
            if not np.array_equal(expected, got):
                raise ExportError(f"{where}: {int((expected != got).sum())} of {got.size} elements differ from torch")
            return
        wide = np.complex128 if np.iscomplexobj(expected) else np.float64
        left, right = expected.astype(wide), got.astype(wide)
        same = (left == right) | (np.isnan(left) & np.isnan(right))  # equal infinities have no difference
        with np.errstate(invalid="ignore"):
            difference = float(np.abs(np.where(same, 0.0, left - right)).max())
        scale = float(np.abs(left[np.isfinite(left)]).max(initial=0.0))
        tolerance = (_HALF_TOLERANCE if expected.dtype == np.float16 else _TOLERANCE) * max(scale, 1.0)
        if not difference <= tolerance:
            raise ExportError(
                f"{where}: onnxruntime differs from torch by up to {difference:.3g} (max abs error); expected at most "
                f"{tolerance:.3g}. A model that draws random numbers in eval mode cannot be compared: verify=False"
            )
        self.max_abs = max(self.max_abs, difference)
        self.max_rel = max(self.max_rel, difference / scale if scale else 0.0)

    def count_top1(self, expected: list[_Array], got: list[_Array]) -> None:
        """Add the rows of the first floating point output of two or more dimensions."""
        for left, right in zip(expected, got, strict=True):
            if left.ndim >= 2 and left.size and np.issubdtype(left.dtype, np.floating):
                agree = left.argmax(axis=1) == right.argmax(axis=1)
                self.same_rows, self.rows = self.same_rows + int(agree.sum()), self.rows + agree.size
                return


def check_parity(model: nn.Module, file: Path, examples: Examples, *, dynamic: bool) -> tuple[Parity, list[str]]:
    """Compare a file with a model on the examples and on random inputs like them.

    Args:
        model: Runs in eval mode here; its modes are as they were afterwards.
        file: The ONNX file.
        examples: The model's example inputs.
        dynamic: Whether to compare with other batch sizes too.

    Returns:
        The differences, and notices about batch sizes that the model itself refuses.

    Raises:
        ExportError: onnxruntime cannot run the file, or an output differs by more than rounding explains.
    """
    session = _session(file)
    generator = torch.Generator().manual_seed(_SEED)
    sizes = tuple(dict.fromkeys((*_BATCH_SIZES, examples.batch_size))) if dynamic else (None, None)
    tally, notices = _Tally(), []
    for call in (examples.call, *(examples.random(size, generator=generator) for size in sizes)):
        first = call.tensors()[0]
        batch_size = first.shape[0] if first.dim() else 1
        try:
            expected = [_array(tensor) for tensor in run(model, call)]
        except Exception as error:  # whatever the model raises
            notices.append(f"not verified with batch size {batch_size}, which the model refuses: {error}")
            continue
        names, got = _run_file(session, call)
        if len(names) != len(expected):
            raise ExportError(
                f"export_onnx: the file has the outputs {names}; the model returns {len(expected)} tensors"
            )
        for name, left, right in zip(names, expected, got, strict=True):
            tally.compare(name, left, right, batch_size=batch_size)
        tally.count_top1(expected, got)
        tally.sizes.append(batch_size)
    top1 = tally.same_rows / tally.rows if tally.rows else None
    return Parity(tally.max_abs, tally.max_rel, top1, len(tally.sizes), tuple(tally.sizes)), notices


def _session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait must not take the processor from the ones of torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no other common base
        raise ExportError(
            f"export_onnx: onnxruntime cannot load the exported model: {error}. It has every operator for float32 and "
            "only some for other types: try model.float()"
        ) from error


def _run_file(session: Any, call: Call) -> tuple[list[str], list[_Array]]:
    inputs, names = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]
    tensors = call.tensors()
    if len(inputs) != len(tensors):
        raise ExportError(
            f"export_onnx: the file has the inputs {inputs}; the example inputs hold {len(tensors)} tensors"
        )
    try:
        feed = {name: _array(tensor) for name, tensor in zip(inputs, tensors, strict=True)}
        return names, session.run(names, feed)
    except Exception as error:  # as above
        raise ExportError(f"export_onnx: onnxruntime cannot run the exported model: {error}") from error


def _array(tensor: Tensor) -> _Array:
    array: _Array = tensor.detach().cpu().numpy()
    return array
