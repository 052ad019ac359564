"""Parity: the written file, run by onnxruntime, against the model it was made from, run by torch."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import nn

from fedmef_fx.errors import ExportError
from fedmef_fx.export.examples import ExampleCall, Examples, run
from fedmef_fx.export.onnx.report import Parity
from fedmef_fx.export.onnx.sessions import Array, Session, array_of

__all__ = ["FLOAT32_TOLERANCE", "OutputMismatchError", "check_parity"]

# Of float32 weights, relative to the largest magnitude of the output, and absolute below 1: two runtimes add up in
# different orders, which a deep network in float32 amplifies to some 1e-6; an error in the graph is larger by orders of
# magnitude.
FLOAT32_TOLERANCE: Final = 1e-4
_HALF_TOLERANCE: Final = 2e-2
_BATCH_SIZES: Final = (1, 2, 3)
_SEED: Final = 1
_LONGER: Final = 3  # a size that is no multiple of the example's


class OutputMismatchError(ExportError):
    """An output of the file differs from the model's by more than rounding explains.

    Attributes:
        call: The arguments with which it does.
    """

    call: ExampleCall | None = None


@dataclasses.dataclass(slots=True)
class _Tally:
    """Differences so far, and the relative one that is allowed; None for any."""

    tolerance: float | None = FLOAT32_TOLERANCE
    max_abs: float = 0.0
    max_rel: float = 0.0
    same_rows: int = 0
    rows: int = 0
    sizes: list[int] = dataclasses.field(default_factory=list)

    def compare(self, name: str, expected: Array, got: Array, *, batch_size: int) -> None:
        """Add the differences of one output.

        Raises:
            ExportError: Another shape or type.
            OutputMismatchError: They are larger than allowed.
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
            if not np.array_equal(expected, got) and self.tolerance is not None:
                raise OutputMismatchError(
                    f"{where}: {int((expected != got).sum())} of {got.size} elements differ from torch"
                )
            return
        wide = np.complex128 if np.iscomplexobj(expected) else np.float64
        left, right = expected.astype(wide), got.astype(wide)
        same = (left == right) | (np.isnan(left) & np.isnan(right))  # equal infinities have no difference
        with np.errstate(invalid="ignore"):
            difference = float(np.abs(np.where(same, 0.0, left - right)).max())
        scale = float(np.abs(left[np.isfinite(left)]).max(initial=0.0))
        tolerance = self._allowed(expected) * max(scale, 1.0)
        if not difference <= tolerance:
            raise OutputMismatchError(
                f"{where}: onnxruntime differs from torch by up to {difference:.3g} (max abs error); expected at most "
                f"{tolerance:.3g}"
            )
        self.max_abs = max(self.max_abs, difference)
        self.max_rel = max(self.max_rel, difference / scale if scale else 0.0)

    def _allowed(self, expected: Array) -> float:
        if self.tolerance is None:
            return float(np.finfo(np.float64).max)  # anything but NaN
        return max(self.tolerance, _HALF_TOLERANCE if expected.dtype == np.float16 else 0.0)

    def count_top1(self, expected: list[Array], got: list[Array]) -> None:
        """Add the rows of the first floating point output of two or more dimensions."""
        for left, right in zip(expected, got, strict=True):
            if left.ndim >= 2 and left.size and np.issubdtype(left.dtype, np.floating):
                agree = left.argmax(axis=1) == right.argmax(axis=1)
                self.same_rows, self.rows = self.same_rows + int(agree.sum()), self.rows + agree.size
                return


def check_parity(
    model: nn.Module,
    session: Session,
    examples: Examples,
    *,
    dynamic: bool,
    tolerance: float | None = FLOAT32_TOLERANCE,
    more: Sequence[ExampleCall] = (),
) -> tuple[Parity, list[str]]:
    """Compare a file with a model on the examples and on random inputs like them.

    Args:
        model: Runs in eval mode here; its modes are as they were afterwards.
        session: Of the ONNX file.
        examples: The model's example inputs.
        dynamic: Whether to compare with other batch sizes too.
        tolerance: Largest difference allowed, relative to an output's largest magnitude; None for any that is finite.
        more: Further calls to compare with.

    Sizes that vary besides the batch are compared at the examples' own and at a larger one.

    Returns:
        The differences, and notices about batch sizes that the model itself refuses.

    Raises:
        OutputMismatchError: An output differs by more than is allowed.
        ExportError: onnxruntime cannot run the file, or gives other shapes or types.
    """
    generator = torch.Generator().manual_seed(_SEED)
    sizes = tuple(dict.fromkeys((*_BATCH_SIZES, examples.batch_size))) if dynamic else (None, None)
    tally, notices = _Tally(tolerance), []
    longer = [_LONGER * (index % 2) if dynamic else 0 for index in range(len(sizes))]
    drawn = [examples.random(n, generator=generator, longer=m) for n, m in zip(sizes, longer, strict=True)]
    for call in (examples.call, *drawn, *more):
        first = call.tensors()[0]
        batch_size = first.shape[0] if first.dim() else 1
        try:
            expected = [array_of(tensor) for tensor in run(model, call, examples.wanted)]
        except Exception as error:  # whatever the model raises
            notices.append(f"not verified with batch size {batch_size}, which the model refuses: {error}")
            continue
        names, got = session.outputs, session.run(call)
        if len(names) != len(expected):
            raise ExportError(
                f"export_onnx: the file has the outputs {names}; the model returns {len(expected)} tensors"
            )
        for name, left, right in zip(names, expected, got, strict=True):
            try:
                tally.compare(name, left, right, batch_size=batch_size)
            except OutputMismatchError as mismatch:
                mismatch.call = call
                raise
        tally.count_top1(expected, got)
        tally.sizes.append(batch_size)
    top1 = tally.same_rows / tally.rows if tally.rows else None
    return Parity(tally.max_abs, tally.max_rel, top1, len(tally.sizes), tuple(tally.sizes)), notices
