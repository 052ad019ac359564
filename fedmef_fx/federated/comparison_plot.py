"""The curves of several runs."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedmef_fx.display.plot_style import COLORS, LINES, drawing, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curves", "plot_curves"]


class Curves(NamedTuple):
    """One run.

    Attributes:
        accuracies: Per round the accuracies of all seeds; empty where none was evaluated.
        sent: Per round the bytes that all parties have sent up to its end.
    """

    accuracies: Sequence[Sequence[float]]
    sent: Sequence[float]


def plot_curves(runs: Mapping[str, Curves], path: Path) -> None:
    """Draw medians over seeds, with the range they span.

    Args:
        runs: Label -> curves.
        path: Of the picture; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed, another format, or a path that cannot be written.
    """
    with drawing(path, (12, 5 + 0.08 * len(runs)), call="MethodComparison.plot") as figure:
        by_round, by_bytes = figure.subplots(1, 2, sharey=True)
        for index, (name, curves) in enumerate(runs.items()):
            places = [place for place, found in enumerate(curves.accuracies) if found]
            _draw(by_round, index, name, curves, places, [float(place) for place in places])
            _draw(by_bytes, index, name, curves, places, [curves.sent[place] / 1e6 for place in places])
        by_round.set_title("test accuracy, median and range of the seeds")
        by_round.set_xlabel("round")
        by_round.locator_params(axis="x", integer=True)
        by_bytes.set_title("the same by bytes sent")
        by_bytes.set_xlabel("sent by all so far (MB)")
        by_bytes.set_xscale("log")
        by_bytes.xaxis.set_major_formatter("{x:g}")  # powers as text: names may hold dollar signs, so no math is parsed
        handles, names = by_round.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)


def _draw(axes: "Axes", index: int, name: str, curves: Curves, places: Sequence[int], x: Sequence[float]) -> None:
    color, line = COLORS[index % len(COLORS)], LINES[index // len(COLORS) % len(LINES)]
    found = [curves.accuracies[place] for place in places]
    axes.plot(x, [statistics.median(values) for values in found], line, marker=".", color=color, label=label(name))
    axes.fill_between(x, [min(v) for v in found], [max(v) for v in found], color=color, alpha=0.15, linewidth=0)
