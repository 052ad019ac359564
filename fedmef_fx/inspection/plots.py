"""Pictures of a model: how dense its layers are, and what a training step keeps when."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from fedmef_fx.display.plot_style import COLORS, LINES, MUTED, drawing, label
from fedmef_fx.errors import ConfigError
from fedmef_fx.inspection.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Moment", "plot_memory", "plot_sparsity"]

Moment: TypeAlias = tuple[str, str, Mapping[str, int]]
"""What is alive at a moment of a step: label (layer or operation), phase, bytes by category."""

_ROW_INCHES: Final = 0.24
_MOST_ROWS: Final = 400


def plot_sparsity(table: Table, path: str | Path, *, call: str = "plot_sparsity") -> None:
    """Draw the density of every layer, and where its bytes for backward went if the table knows.

    Args:
        table: What `Inspection.table` returns.
        path: The file to write; its suffix says the format: .png, .svg or .pdf.
        call: What the user called, for error messages.

    Raises:
        ConfigError: matplotlib is not installed, another format, a path that cannot be written, or no layers.
    """
    rows = table.rows[:_MOST_ROWS]
    if not rows:
        raise ConfigError(f"{call}: the model has no prunable weights; expected at least one")
    has_saved = any(row.saved is not None for row in rows)
    with drawing(path, (11 if has_saved else 7, 1.2 + _ROW_INCHES * len(rows)), call=call) as figure:
        axes = figure.subplots(1, 2 if has_saved else 1, sharey=True, squeeze=False)[0]
        places = range(len(rows))
        axes[0].barh(places, [1.0] * len(rows), color=MUTED, alpha=0.25)
        axes[0].barh(places, [row.density for row in rows], color=COLORS[0])
        for place, row in zip(places, rows, strict=True):
            axes[0].annotate(f" {row.density:.2f}", (row.density, place), va="center", fontsize="x-small")
        axes[0].set_yticks(places, [label(row.parameter) for row in rows])
        axes[0].invert_yaxis()
        axes[0].set_xlim(0, 1)
        axes[0].set_title(f"active share of each layer's weights; {table.total.density:.3f} in all")
        if has_saved:
            _saved_bars(axes[1], table)


def _saved_bars(axes: "Axes", table: Table) -> None:
    rows = table.rows[:_MOST_ROWS]
    places = range(len(rows))
    if any(row.saved_before is not None for row in rows):
        before = [(row.saved_before or 0) / 1e6 for row in rows]
        axes.barh(places, before, color=MUTED, alpha=0.5, label="before")
    axes.barh(places, [(row.saved or 0) / 1e6 for row in rows], color=COLORS[1], height=0.5, label="after")
    axes.set_title("kept for backward (MB)")
    axes.legend(loc="lower right")


def plot_memory(
    moments: Sequence[Moment], path: str | Path, *, before: Sequence[Moment] | None = None, call: str = "plot_memory"
) -> None:
    """Draw what is alive over a training step, stacked by category; and the total of another step as a line.

    Args:
        moments: In the order of the step.
        path: The file to write; its suffix says the format: .png, .svg or .pdf.
        before: The step to compare with, such as that of the original model.
        call: What the user called, for error messages.

    Raises:
        ConfigError: matplotlib is not installed, another format, a path that cannot be written, or no moments.
    """
    if not moments:
        raise ConfigError(f"{call}: got no moments; expected those of a training step")
    categories = list(dict.fromkeys(category for _, _, live in moments for category in live))
    with drawing(path, (10, 5), call=call) as figure:
        axes = figure.subplots()
        # Steps of different models have different numbers of moments: each is drawn over its phases.
        places = _places(moments)
        series = [[live.get(category, 0) / 1e6 for _, _, live in moments] for category in categories]
        colors = [COLORS[index % len(COLORS)] for index in range(len(categories))]
        axes.stackplot(places, series, labels=list(map(label, categories)), colors=colors, alpha=0.8)
        if before:
            totals = [sum(live.values()) / 1e6 for *_, live in before]
            axes.plot(_places(before), totals, color="black", linestyle=LINES[1], label="before, in all")
        _mark_phases(axes, moments)
        highest = max(moments, key=lambda moment: sum(moment[2].values()))
        axes.set_title(f"peak {sum(highest[2].values()) / 1e6:.1f} MB in {label(highest[1])}, {label(highest[0])}")
        axes.set_ylabel("alive (MB)")
        axes.margins(x=0)
        axes.legend(loc="upper left", reverse=True)


def _phases(moments: Sequence[Moment]) -> list[str]:
    return list(dict.fromkeys(phase for _, phase, _ in moments))


def _places(moments: Sequence[Moment]) -> list[float]:
    """Where each moment stands: every phase has the width 1."""
    phases = {phase: index for index, phase in enumerate(_phases(moments))}
    count = {phase: sum(other == phase for _, other, _ in moments) for phase in phases}
    seen: dict[str, int] = dict.fromkeys(phases, 0)
    places = []
    for _, phase, _ in moments:
        places.append(phases[phase] + seen[phase] / count[phase])
        seen[phase] += 1
    return places


def _mark_phases(axes: "Axes", moments: Sequence[Moment]) -> None:
    names: list[Any] = _phases(moments)
    for index in range(1, len(names)):
        axes.axvline(index, color=MUTED, linestyle=LINES[3])
    axes.set_xticks([index + 0.5 for index in range(len(names))], [label(name) for name in names])
    axes.tick_params(axis="x", length=0)
