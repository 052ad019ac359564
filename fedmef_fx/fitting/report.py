"""What `fit` tried, what each try takes and scores, and whether the limits are kept."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmef_fx.display.plot_style import drawing
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.display.text_table import text_table
from fedmef_fx.fitting.sensitivity import LayerSensitivity

__all__ = ["FitCandidate", "FitReport"]


@dataclasses.dataclass(frozen=True, slots=True)
class FitCandidate:
    """One file.

    Attributes:
        form: "original", or how the model was made smaller: "packed", "packed-int8", "channel", "channel-int8", "int8".
        density: Share of the weights, or channels, that was kept.
        bytes: Of the file.
        latency_ms: Of one call on the example inputs: the median of several in onnxruntime, or what `latency` returned;
            None where none is asked.
        score: Of the file in onnxruntime on the held-out data; higher is better.
        misses: Which limits it exceeds, and by how much.
    """

    form: str
    density: float
    bytes: int
    latency_ms: float | None
    score: float
    misses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class FitReport:
    """The result of `fit`.

    Attributes:
        candidates: All files that were made, the original's first.
        chosen: Place of the chosen one.
        max_bytes: The limit; None for none.
        max_latency_ms: Likewise.
        sensitivity: What each layer can do without.
        export_options: Arguments for `export_onnx` that make the chosen file of the returned model.
        path: The chosen file; None where none was asked for.
    """

    candidates: tuple[FitCandidate, ...]
    chosen: int
    max_bytes: int | None
    max_latency_ms: float | None
    sensitivity: tuple[LayerSensitivity, ...]
    export_options: Mapping[str, Any]
    path: Path | None = None

    @property
    def original(self) -> FitCandidate:
        """The file of the model as it was."""
        return self.candidates[0]

    @property
    def result(self) -> FitCandidate:
        """The chosen file."""
        return self.candidates[self.chosen]

    @property
    def fits(self) -> bool:
        """Whether all limits are kept."""
        return not self.result.misses

    @property
    def pareto(self) -> tuple[FitCandidate, ...]:
        """The candidates that no other one beats in size, latency and score at once, smallest first."""
        best = [one for one in self.candidates if not any(_beats(other, one) for other in self.candidates)]
        return tuple(sorted(best, key=lambda candidate: candidate.bytes))

    def as_dict(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes, without calibration data."""
        return {
            "candidates": [dataclasses.asdict(candidate) for candidate in self.candidates],
            "pareto": [self.candidates.index(candidate) for candidate in self.pareto],
            "chosen": self.chosen,
            "fits": self.fits,
            "max_bytes": self.max_bytes,
            "max_latency_ms": self.max_latency_ms,
            "sensitivity": [
                {**layer.as_dict(), "by_share": _texts(layer.by_share), "by_channels": _texts(layer.by_channels)}
                for layer in self.sensitivity
            ],
            "path": None if self.path is None else str(self.path),
        }

    def __str__(self) -> str:
        best = self.pareto
        rows = [
            [
                ("-> " if place == self.chosen else "   ") + one.form,
                f"{one.density:.3f}",
                f"{one.bytes:,}",
                "" if one.latency_ms is None else f"{one.latency_ms:.3f}",
                f"{one.score:.4f}",
                "yes" if one in best else "",
                "; ".join(one.misses) or "yes",
            ]
            for place, one in enumerate(self.candidates)
        ]
        headings = ["file", "density", "bytes", "ms", "score", "Pareto", "within limits"]
        verdict = "within the limits" if self.fits else f"NOT within the limits: {'; '.join(self.result.misses)}"
        table = text_table(headings, rows, left=frozenset((0, 6)))
        return f"{table}\n{self.result.form}, {shown_bytes(self.result.bytes)}: {verdict}"

    def plot(self, path: str | Path) -> Path:
        """Draw score over bytes, the Pareto set as a line, limits dashed; needs matplotlib."""
        with drawing(path, (6.0, 4.0), call="FitReport.plot") as figure:
            axes = figure.add_subplot()
            best = self.pareto
            axes.plot([one.bytes for one in best], [one.score for one in best], marker="o")
            for one in self.candidates:
                axes.plot([one.bytes], [one.score], marker="o", linestyle="")
                axes.annotate(f"{one.form} {one.density:.2f}", (one.bytes, one.score))
            if self.max_bytes is not None:
                axes.axvline(self.max_bytes, linestyle="--")
            axes.set_xscale("log")
            axes.set_xlabel("bytes of the file")
            axes.set_ylabel("score")
        return Path(path)


def _beats(one: FitCandidate, other: FitCandidate) -> bool:
    pairs = [(one.bytes, other.bytes), (-one.score, -other.score), (one.latency_ms or 0.0, other.latency_ms or 0.0)]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def _texts(levels: Mapping[float, float]) -> dict[str, float]:
    return {f"{level:g}": cost for level, cost in levels.items()}
