"""Pictures of a model: how dense its layers are, and what they keep for backward."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedmef_fx.display.plot_style import COLORS, MUTED, drawing, label
from fedmef_fx.errors import ConfigError
from fedmef_fx.inspection.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_sparsity"]

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
