"""The plot of a history."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedmef_fx.display.plot_style import COLORS, LINES, MUTED, drawing, label
from fedmef_fx.federated.rounds import RoundRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history"]

_LAYERS: Final = 7  # with a colour of their own; the others are drawn together


def plot_history(rounds: Sequence[RoundRecord], path: Path) -> None:
    """Draw a history; adjustment rounds are marked by dotted lines.

    Args:
        rounds: The rounds, in order.
        path: Of the picture; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed, another format, or a path that cannot be written.
    """
    with drawing(path, (14, 7), call="History.plot") as figure:
        grid = figure.subplots(2, 3)
        accuracy = [r.test_accuracy for r in rounds]
        losses: dict[str, list[float | None]] = {
            "train": [r.train_loss for r in rounds],
            "test": [r.test_loss for r in rounds],
        }
        traffic = {"down": [r.bytes_down / 1e6 for r in rounds], "up": [r.bytes_up / 1e6 for r in rounds]}
        _draw(grid[0, 0], rounds, "accuracy on the test set", {"": accuracy})
        _draw(grid[0, 1], rounds, "loss", losses)
        _draw_by_bytes(grid[0, 2], rounds)
        _draw(grid[1, 0], rounds, "traffic per round (MB)", traffic)
        saved = {"": [r.peak_saved_bytes / 1e6 for r in rounds]}
        _draw(grid[1, 1], rounds, "kept between forward and backward, peak (MB)", saved)
        _draw_churn(grid[1, 2], rounds)
        for axes in (grid[1, 0], grid[1, 1]):
            axes.set_ylim(bottom=0)


def _draw(
    axes: "Axes", rounds: Sequence[RoundRecord], title: str, series: Mapping[str, Sequence[float | None]]
) -> None:
    for index, (name, values) in enumerate(series.items()):
        # A round that was not evaluated leaves a gap.
        heights = [float("nan") if value is None else value for value in values]
        places = [r.round_index for r in rounds]
        axes.plot(places, heights, LINES[index], marker=".", color=COLORS[index], label=name or None)
    for record in rounds:
        if record.adjusted:
            axes.axvline(record.round_index, color=MUTED, linestyle=LINES[3], zorder=0)
    axes.set_title(title)
    axes.set_xlabel("round")
    axes.locator_params(axis="x", integer=True)
    if len(series) > 1:
        axes.legend()


def _draw_by_bytes(axes: "Axes", rounds: Sequence[RoundRecord]) -> None:
    """Accuracy against what was sent so far: what a bandwidth budget buys."""
    sent = itertools.accumulate((r.bytes_down + r.bytes_up) / 1e6 for r in rounds)
    points = [(total, r.test_accuracy) for total, r in zip(sent, rounds, strict=True) if r.test_accuracy is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], marker=".", color=COLORS[0])
    axes.set_title("accuracy by bytes sent")
    axes.set_xlabel("sent by all so far (MB)")


def _draw_churn(axes: "Axes", rounds: Sequence[RoundRecord]) -> None:
    """Weights that changed places in each adjustment round, stacked by layer."""
    adjusted = [r for r in rounds if r.churn]
    totals: dict[str, int] = {}
    for record in adjusted:
        for name, count in record.churn.items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: -totals[name])
    shown, others = names[:_LAYERS], names[_LAYERS:]
    stacks = {label(name): [r.churn.get(name, 0) for r in adjusted] for name in shown}
    if others:
        stacks[f"{len(others)} others"] = [sum(r.churn.get(name, 0) for name in others) for r in adjusted]
    bottom = [0] * len(adjusted)
    for index, (name, counts) in enumerate(stacks.items()):
        color = COLORS[index] if index < _LAYERS else MUTED
        axes.bar([r.round_index for r in adjusted], counts, bottom=bottom, color=color, label=name)
        bottom = [low + count for low, count in zip(bottom, counts, strict=True)]
    axes.set_title("weights that changed places, by layer")
    axes.set_xlabel("round")
    axes.locator_params(axis="x", integer=True)
    if stacks:
        axes.legend(fontsize="x-small")
