"""The file that a model becomes in a form: written, timed, scored, and held against the limits."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedmef_fx.export.compact.compact import compact
from fedmef_fx.export.examples import ExampleCall
from fedmef_fx.export.freeze.freeze import freeze
from fedmef_fx.export.onnx.onnx_file import export_onnx
from fedmef_fx.fitting.report import FitCandidate
from fedmef_fx.fitting.samples import Samples, mean_score
from fedmef_fx.sparse_model.transformation import is_transformed

__all__ = ["FORMS", "Files", "Form"]

_TIMED: Final = 20
_CALIBRATION_BATCHES: Final = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """One way to make a model smaller.

    Attributes:
        name: Its name in reports.
        granularity: Of the masks; "" for none.
        weights: How the file stores weights.
        is_quantized: Whether the file computes in 8 bits.
    """

    name: str
    granularity: str
    weights: str
    is_quantized: bool

    @property
    def value_bytes(self) -> int:
        """Of a weight's value."""
        return 1 if self.is_quantized else 4


FORMS: Final = {
    form.name: form
    for form in (
        Form("int8", "", "dense", is_quantized=True),
        Form("packed", "weight", "packed", is_quantized=False),
        Form("packed-int8", "weight", "packed", is_quantized=True),
        Form("channel", "channel", "packed", is_quantized=False),
        Form("channel-int8", "channel", "packed", is_quantized=True),
    )
}


@dataclasses.dataclass(frozen=True)
class Files:
    """Makes files and looks at them.

    Attributes:
        folder: Where they are written.
        examples: Arguments of one call.
        samples: The data.
        score: Of the outputs of a batch and its target.
        max_bytes: The limit; None for none.
        max_latency_ms: Likewise.
        latency: Milliseconds of one call of a file; None measures them here.
    """

    folder: Path
    examples: tuple[Any, ...]
    samples: Samples
    score: Callable[[Any, Any], float]
    max_bytes: int | None
    max_latency_ms: float | None
    latency: Callable[[Path], float] | None = None

    def options(self, form: Form | None) -> dict[str, Any]:
        """Arguments of `export_onnx` for a form; None is the original as it is."""
        if form is None:
            return {"weights": "dense"}
        if not form.is_quantized:
            return {"weights": form.weights}
        batches = self.samples.training(0)
        calibration = [next(batches).inputs for _ in range(min(_CALIBRATION_BATCHES, self.samples.steps))]
        return {"weights": form.weights, "quantize": "int8", "calibration_data": calibration}

    def plain(self, model: nn.Module, form: Form | None) -> nn.Module:
        """The module that a form's file is made of."""
        if form is not None and form.granularity == "channel":
            return compact(model, self.examples)
        return freeze(model) if is_transformed(model) else model

    def write(self, model: nn.Module, form: Form | None, path: Path) -> int:
        """Write the file of a plain module; its bytes."""
        report = export_onnx(model, path, example_inputs=self.examples, verify=False, **self.options(form))
        return report.bytes

    def candidate(self, model: nn.Module, form: Form | None, density: float) -> tuple[FitCandidate, nn.Module, Path]:
        """Make the file of a model and look at it."""
        name = "original" if form is None else form.name
        path = self.folder / f"{name}.onnx"
        plain = self.plain(model, form)
        size = self.write(plain, form, path)
        latency, score = self._measured(path)
        misses = tuple(self.misses(size, latency))
        return FitCandidate(name, density, size, latency, score, misses), plain, path

    def _measured(self, path: Path) -> tuple[float | None, float]:
        from fedmef_fx.export.onnx.sessions import open_session  # noqa: PLC0415 -- imports onnxruntime

        session = open_session(path)

        def run(inputs: tuple[Any, ...]) -> list[Tensor]:
            return [torch.from_numpy(array) for array in session.run(ExampleCall(inputs, {}))]

        score = mean_score(lambda batch: run(batch.inputs), self.samples.evaluation, self.score)
        if self.max_latency_ms is None:
            return None, score
        if self.latency is not None:
            return float(self.latency(path)), score
        times = []
        for _ in range(_TIMED):
            start = time.perf_counter()
            run(self.examples)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), score

    def misses(self, size: int, latency: float | None) -> list[str]:
        """Which limits are exceeded, and by how much."""
        found = []
        if self.max_bytes is not None and size > self.max_bytes:
            excess = size - self.max_bytes
            found.append(f"max_bytes by {excess:,} bytes ({excess / self.max_bytes:.1%})")
        if self.max_latency_ms is not None and latency is not None and latency > self.max_latency_ms:
            excess_ms = latency - self.max_latency_ms
            found.append(f"max_latency_ms by {excess_ms:.3f} ms ({excess_ms / self.max_latency_ms:.1%})")
        return found
