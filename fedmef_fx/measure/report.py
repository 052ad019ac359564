"""`MemoryReport`: the bytes of one training step, for people, for machines and as a picture."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmef_fx.display.notebook import escaped, fragment, html_table
from fedmef_fx.measure.allocator import CudaPeak
from fedmef_fx.measure.plotting import plot_timeline
from fedmef_fx.measure.resident import ResidentGrowth
from fedmef_fx.measure.timeline import CATEGORIES, Category, Event, LayerMemory, Site

__all__ = ["MemoryReport"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """Bytes of one training step.

    Attributes:
        weights: Parameters, pruned weights included where they are stored.
        buffers: Masks, running statistics and other buffers.
        inputs: Tensors of the example inputs; they exist anyway and count in no other field but the peak.
        gradients: Gradients of the parameters after the backward pass.
        optimizer: State of the optimizer; 0 without one.
        saved: Kept between forward and backward, by kind: "dense", "packed values", "bitmap" (window offsets of max
            pooling, too), "8-bit".
        transients: The most that was alive at any moment and is none of the above: what operations pass on to each
            other, results of the model and the loss included.
        peak: The most that was alive at any moment, everything above included; workspaces inside an operation are not
            seen, see `allocator_peak`.
        peak_site: When that was.
        at_peak: What was alive then, by category.
        layers: Per module, what it holds between forward and backward and what it takes on top while it runs.
        timeline: Every change of what is alive, in order.
        is_predicted: Whether the step ran on shapes only.
        allocator_peak: Peak of torch's CPU allocator, temporaries inside operations included; None if not asked for.
        rss: Resident memory of a fresh process; None if not requested, or unavailable as `notes` say.
        cuda: Peaks of CUDA's allocator; None if the model is not there.
        notes: What the figures leave out, and why figures are missing.
    """

    weights: int
    buffers: int
    inputs: int
    gradients: int
    optimizer: int = 0
    saved: Mapping[str, int]
    transients: int
    peak: int
    peak_site: Site
    at_peak: Mapping[Category, int]
    layers: tuple[LayerMemory, ...] = ()
    timeline: tuple[Event, ...] = dataclasses.field(default=(), repr=False)
    is_predicted: bool = False
    allocator_peak: int | None = None
    rss: ResidentGrowth | None = None
    cuda: CudaPeak | None = None
    notes: tuple[str, ...] = ()

    @property
    def saved_total(self) -> int:
        """Everything that is kept between forward and backward."""
        return sum(self.saved.values())

    def as_dict(self, *, timeline: bool = False) -> dict[str, Any]:
        """The report as JSON values.

        Args:
            timeline: With every event; there are thousands.
        """
        return {
            "weights": self.weights,
            "buffers": self.buffers,
            "inputs": self.inputs,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "saved": dict(self.saved),
            "saved_total": self.saved_total,
            "transients": self.transients,
            "peak": self.peak,
            "peak_site": dataclasses.asdict(self.peak_site),
            "at_peak": dict(self.at_peak),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "is_predicted": self.is_predicted,
            "allocator_peak": self.allocator_peak,
            "rss": None if self.rss is None else self.rss.as_dict(),
            "cuda": None if self.cuda is None else dataclasses.asdict(self.cuda),
            "notes": list(self.notes),
            **({"timeline": self._timeline()} if timeline else {}),
        }

    def _timeline(self) -> dict[str, Any]:
        events = [[e.site.phase, e.site.path, e.site.op, *e.live] for e in self.timeline]
        return {"columns": ["phase", "path", "op", *CATEGORIES], "events": events}

    def to_json(self, *, timeline: bool = False) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(timeline=timeline), indent=2)

    def rows(self) -> list[tuple[str, int]]:
        """What is shown, as label and bytes."""
        return [
            ("weights", self.weights),
            ("buffers", self.buffers),
            ("inputs", self.inputs),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("saved for backward", self.saved_total),
            *((f"  {kind}", count) for kind, count in self.saved.items()),
            ("transients at most", self.transients),
            ("predicted peak" if self.is_predicted else "peak", self.peak),
            *([] if self.allocator_peak is None else [("allocator peak", self.allocator_peak)]),
            *([] if self.cuda is None else [("CUDA allocated", self.cuda.allocated)]),
            *([] if self.cuda is None else [("CUDA reserved", self.cuda.reserved)]),
            *([] if self.rss is None else [("RSS growth", self.rss.growth), ("  of the step", self.rss.step)]),
        ]

    def largest_layers(self, count: int = 10) -> list[LayerMemory]:
        """The layers that hold most between forward and backward, largest first; those that hold nothing left out."""
        return sorted((layer for layer in self.layers if layer.held), key=lambda layer: -layer.held)[:count]

    def __str__(self) -> str:
        lines = [f"{label:20s}{count:>15,d} bytes" for label, count in self.rows()]
        return "\n".join([*lines, f"peak at: {self.peak_site}", *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rows = [(label.strip(), f"{count:,d}") for label, count in self.rows()]
        table = html_table(("", "bytes"), rows, left={0}, caption=f"peak at: {self.peak_site}")
        return fragment(table, *(f"<p>{escaped(note)}</p>" for note in self.notes))

    def plot(self, path: str | Path) -> None:
        """Draw what is alive over the step, stacked by category, as PNG or SVG.

        Args:
            path: File to write; its suffix names the format.

        Raises:
            ConfigError: Another suffix, or matplotlib (extra `fedmef-fx[viz]`) is not installed.
        """
        plot_timeline(self.timeline, path)
