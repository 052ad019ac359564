"""The plot of a history; imported only when somebody asks for it, because matplotlib takes its time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.history import RoundRecord

__all__ = ["plot_history"]


def plot_history(rounds: Sequence[RoundRecord], path: Path) -> None:
    """Draw a history; adjustment rounds are marked by dotted lines.

    Args:
        rounds: The rounds, in order.
        path: Of the picture; the suffix says the format.

    Raises:
        ConfigError: A format that matplotlib does not write, or a path that cannot be written.
    """
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2, sharex=True)
    _draw(top_left, rounds, "accuracy on the test set", {"": [r.test_accuracy for r in rounds]})
    losses: dict[str, list[float | None]] = {
        "train": [r.train_loss for r in rounds],
        "test": [r.test_loss for r in rounds],
    }
    _draw(top_right, rounds, "loss", losses)
    traffic = {"down": [r.bytes_down / 1e6 for r in rounds], "up": [r.bytes_up / 1e6 for r in rounds]}
    _draw(bottom_left, rounds, "traffic per round (MB)", traffic)
    saved = {"": [r.peak_saved_bytes / 1e6 for r in rounds]}
    _draw(bottom_right, rounds, "kept between forward and backward, peak (MB)", saved)
    for axes in (bottom_left, bottom_right):
        axes.set_xlabel("round")
        axes.set_ylim(bottom=0)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"History.plot: {path}: {error}") from error


def _draw(
    axes: Axes,
    rounds: Sequence[RoundRecord],
    title: str,
    series: Mapping[str, Sequence[float | None]],
) -> None:
    for label, values in series.items():
        # A round that was not evaluated leaves a gap.
        heights = [float("nan") if value is None else value for value in values]
        axes.plot([r.round_index for r in rounds], heights, marker=".", label=label or None)
    for record in rounds:
        if record.adjusted:
            axes.axvline(record.round_index, color="0.8", linestyle=":", zorder=0)
    axes.set_title(title, fontsize="medium")
    if len(series) > 1:
        axes.legend()
