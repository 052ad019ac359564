"""The picture of a step; imported only when somebody asks for it, because matplotlib takes its time."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fedmef_fx.errors import ConfigError
from fedmef_fx.measure.timeline import CATEGORIES, Event

__all__ = ["plot_timeline"]

_FORMATS: Final = (".png", ".svg", ".pdf")
_COLORS: Final = ("#4c72b0", "#8c8c8c", "#c7c7c7", "#dd8452", "#937860", "#55a868", "#c44e52")


def plot_timeline(events: Sequence[Event], path: str | Path) -> None:
    """Draw what is alive after each operation, stacked by category.

    Args:
        events: Of a `StepTimeline`, in order.
        path: Of the picture; its suffix says the format.

    Raises:
        ConfigError: An unknown format, a path that cannot be written, or no matplotlib.
    """
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ConfigError(f"MemoryReport.plot: {path}: expected a file name that ends in {' | '.join(_FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('MemoryReport.plot: matplotlib is not installed; pip install "fedmef-fx[viz]"')
    from matplotlib.figure import Figure  # noqa: PLC0415 -- an extra

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    steps = range(len(events))
    series = [[event.live[i] / 1e6 for event in events] for i in range(len(CATEGORIES))]
    axes.stackplot(steps, *series, labels=CATEGORIES, colors=_COLORS, step="post", linewidth=0)
    for index in _phase_starts(events):
        axes.axvline(index, color="0.3", linestyle=":", linewidth=1)
        axes.annotate(events[index].site.phase, (index, 1), xycoords=("data", "axes fraction"), fontsize="small")
    totals = [sum(event.live) for event in events]
    if totals:
        highest = max(steps, key=totals.__getitem__)
        axes.set_title(f"peak {totals[highest] / 1e6:.1f} MB: {events[highest].site}", loc="left", pad=18)
    axes.set_xlabel("operations that changed what is alive")
    axes.set_ylabel("MB alive")
    axes.margins(x=0)
    axes.legend(loc="upper left", fontsize="small", reverse=True)
    try:
        figure.savefig(target)
    except OSError as error:
        raise ConfigError(f"MemoryReport.plot: {path}: cannot be written: {error}") from error


def _phase_starts(events: Sequence[Event]) -> list[int]:
    phases = [event.site.phase for event in events]
    return [i for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]
