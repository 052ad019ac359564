"""Memory over one training step, as the page draws it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, Self

from fedmef_fx.measure.report import MemoryReport
from fedmef_fx.measure.timeline import CATEGORIES, Event

__all__ = ["MemoryPair", "Timeline"]

_MOST_MOMENTS: Final = 600
_MOST_LAYERS: Final = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Bytes by category at moments of one training step, in order of time.

    Attributes:
        moments: What had just run at each moment, e.g. `layer1.0.conv1, convolution`.
        phases: Name of each phase and the index of its first moment: `(("forward", 0), ("backward", 61))`.
        categories: Category -> its bytes at each moment; drawn on top of one another in this order.
        layers: Module -> what it added to the saved bytes in forward; those that added nothing are left out.
    """

    moments: tuple[str, ...]
    phases: tuple[tuple[str, int], ...]
    categories: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, events: Sequence[Event]) -> Self | None:
        """The timeline of a step's events; None where there are none.

        Of a longer step each of 600 stretches is shown by the moment in it at which most was alive, so the peak stays.
        """
        if not events:
            return None
        step = -(-len(events) // _MOST_MOMENTS)
        phases = list(dict.fromkeys(event.site.phase for event in events))
        kept: list[Event] = []
        starts: list[tuple[str, int]] = []
        for phase in phases:
            inside = [event for event in events if event.site.phase == phase]
            starts.append((phase, len(kept)))
            stretches = (inside[at : at + step] for at in range(0, len(inside), step))
            kept += (max(stretch, key=lambda event: sum(event.live)) for stretch in stretches)
        columns = zip(CATEGORIES, zip(*(event.live for event in kept), strict=True), strict=True)
        return cls(
            moments=tuple(f"{event.site.path or 'model'}, {event.site.op}" for event in kept),
            phases=tuple(starts),
            categories={name: counts for name, counts in columns if any(counts)},
            layers=_kept_by(events),
        )

    @property
    def totals(self) -> list[int]:
        """All bytes at each moment."""
        return [sum(counts) for counts in zip(*self.categories.values(), strict=True)]

    @property
    def peak(self) -> dict[str, int]:
        """Category -> its bytes at the moment at which most is alive."""
        totals = self.totals
        at = totals.index(max(totals)) if totals else 0
        return {name: counts[at] for name, counts in self.categories.items()}

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "moments": list(self.moments),
            "phases": [list(phase) for phase in self.phases],
            "categories": [[name, list(counts)] for name, counts in self.categories.items()],
            "layers": [
                list(entry) for entry in sorted(self.layers.items(), key=lambda entry: -entry[1])[:_MOST_LAYERS]
            ],
        }


def _kept_by(events: Sequence[Event]) -> dict[str, int]:
    """What each module added to the saved bytes in forward."""
    place = CATEGORIES.index("saved")
    kept: dict[str, int] = {}
    before = 0
    for event in events:
        if event.site.phase != "forward":
            break
        kept[event.site.path] = kept.get(event.site.path, 0) + event.live[place] - before
        before = event.live[place]
    return {path: count for path, count in kept.items() if count > 0}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPair:
    """The timelines of a model and of its original.

    Attributes:
        after: Of the model.
        before: Of the original; None where it was not measured.
    """

    after: Timeline
    before: Timeline | None = None

    @classmethod
    def of(cls, after: MemoryReport | None, before: MemoryReport | None = None) -> Self | None:
        """The timelines of one or two reports; None without a timeline of the model."""
        lines = [None if report is None else Timeline.of(report.timeline) for report in (after, before)]
        return None if lines[0] is None else cls(after=lines[0], before=lines[1])
