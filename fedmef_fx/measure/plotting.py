"""The picture of a step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedmef_fx.display.plot_style import COLORS, MUTED, drawing, label
from fedmef_fx.measure.timeline import CATEGORIES, Event

__all__ = ["plot_timeline"]

_COLORS: Final = (COLORS[0], MUTED, "#cccccc", *COLORS[1:5])


def plot_timeline(events: Sequence[Event], path: str | Path) -> None:
    """Draw what is alive after each operation, stacked by category.

    Args:
        events: Of a `StepTimeline`, in order.
        path: Of the picture; its suffix says the format.

    Raises:
        ConfigError: An unknown format, a path that cannot be written, or no matplotlib.
    """
    with drawing(path, (10, 5), call="MemoryReport.plot") as figure:
        axes = figure.subplots()
        steps = range(len(events))
        series = [[event.live[i] / 1e6 for event in events] for i in range(len(CATEGORIES))]
        axes.stackplot(steps, *series, labels=CATEGORIES, colors=_COLORS, step="post", linewidth=0)
        for index in _phase_starts(events):
            axes.axvline(index, color=MUTED, linestyle=":", linewidth=1)
            axes.annotate(events[index].site.phase, (index, 1), xycoords=("data", "axes fraction"), fontsize="small")
        totals = [sum(event.live) for event in events]
        if totals:
            highest = max(steps, key=totals.__getitem__)
            axes.set_title(f"peak {totals[highest] / 1e6:.1f} MB: {label(str(events[highest].site))}", pad=18)
        axes.set_xlabel("operations that changed what is alive")
        axes.set_ylabel("MB alive")
        axes.margins(x=0)
        axes.legend(loc="upper left", reverse=True)


def _phase_starts(events: Sequence[Event]) -> list[int]:
    phases = [event.site.phase for event in events]
    return [i for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]
