"""Several runs side by side: a table with medians over seeds, every round as CSV, curves.

`compare` takes histories that are there; `compare_methods` (in `cells`) makes them, from the same clients and seeds.
"""

import csv
import dataclasses
import io
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedmef_fx.display.notebook import fragment, html_table
from fedmef_fx.display.printable import visible
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.display.text_table import text_table
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.comparison_plot import Curves, plot_curves
from fedmef_fx.federated.history import History
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.files.atomic import check_target, replacing

__all__ = ["MethodComparison", "compare"]

_HEADINGS: Final = (
    "run",
    "seeds",
    "accuracy",
    "lowest",
    "highest",
    "loss",
    "density",
    "down",
    "up",
    "saved peak",
    "seconds",
)
_ROUND_FIELDS: Final = tuple(
    field.name
    for field in dataclasses.fields(RoundRecord)
    if field.name not in ("clients", "churn", "metrics", "by_client")
)


@dataclasses.dataclass(frozen=True, eq=False)
class MethodComparison:
    """Runs by label, each with one history per seed.

    Attributes:
        runs: Label -> seed -> history.
        failures: Label -> seed -> why there is none.
    """

    runs: Mapping[str, Mapping[int, History]]
    failures: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)

    def accuracies(self, label: str) -> list[float]:
        """Final test accuracies of a run, one per seed that was evaluated, in the order of seeds."""
        found = (history.test_accuracy for history in self.runs[label].values())
        return [accuracy for accuracy in found if accuracy is not None]

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows of the table; numbers are medians over seeds."""
        rows = [_row(label, list(histories.values()), self.accuracies(label)) for label, histories in self.runs.items()]
        return _HEADINGS, rows

    def notes(self) -> list[str]:
        """What is missing from the table: one line for each failed run."""
        return [
            visible(f"{label}, seed {seed}: failed: {reason}")
            for label, reasons in self.failures.items()
            for seed, reason in reasons.items()
        ]

    def to_markdown(self) -> str:
        """The table and its notes as Markdown."""
        headings, rows = self.cells()
        lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        table = [f"| {' | '.join(line)} |" for line in escaped]
        return "\n".join([*table, *(f"\n{note}" for note in self.notes())]) + "\n"

    def to_csv(self) -> str:
        """Every round of every run as CSV; numbers as they are, empty where there is none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("run", "seed", *_ROUND_FIELDS))
        for label, histories in self.runs.items():
            for seed, history in histories.items():
                writer.writerows(
                    (label, seed, *(getattr(record, name) for name in _ROUND_FIELDS)) for record in history.rounds
                )
        return text.getvalue()

    def to_json(self) -> str:
        """Final figures of every run and seed, and what failed, as JSON text."""
        runs = {
            label: {str(seed): _figures(history) for seed, history in histories.items()}
            for label, histories in self.runs.items()
        }
        failures = {label: {str(s): why for s, why in reasons.items()} for label, reasons in self.failures.items()}
        return json.dumps({"runs": runs, "failures": failures}, indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Write it as .md, .csv or .json, or draw it as .png, .svg or .pdf; the file is either the old one or complete.

        Raises:
            ConfigError: Another format, or a file that cannot be written.
        """
        target = check_target(path, error=ConfigError)
        texts: dict[str, Callable[[], str]] = {".md": self.to_markdown, ".csv": self.to_csv, ".json": self.to_json}
        suffix = target.suffix.lower()
        if suffix not in texts:
            self.plot(target)
            return
        with replacing(target, error=ConfigError) as temporary:
            temporary.write_text(texts[suffix](), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draw test accuracy by rounds and by bytes sent: the median of the seeds, and the range they span.

        Raises:
            ConfigError: matplotlib is not installed, another format, or a file that cannot be written.
        """
        target = check_target(path, error=ConfigError)
        curves = {label: _curves(list(histories.values())) for label, histories in self.runs.items()}
        with replacing(target, error=ConfigError) as temporary:
            drawn = temporary.with_suffix(target.suffix)  # matplotlib takes the format from it
            try:
                plot_curves(curves, drawn)
                drawn.replace(temporary)
            finally:
                drawn.unlink(missing_ok=True)

    def _repr_html_(self) -> str:
        headings, rows = self.cells()
        return fragment(html_table(headings, rows, left={0}, caption="; ".join(self.notes())))

    def __str__(self) -> str:
        headings, rows = self.cells()
        return "\n".join([text_table(headings, rows, left=frozenset({0})), *self.notes()])


def compare(runs: Mapping[str, History | Sequence[History]] | Sequence[History]) -> MethodComparison:
    """Put runs side by side.

    Args:
        runs: Label -> a history, or one per seed. The seed of a history is that of its configuration. Histories without
            labels are called by their methods.

    Raises:
        ConfigError: No runs, one without rounds, runs of different lengths, or two of the same seed under one label.

    Example:
        >>> print(compare({"fedmef": [history_0, history_1], "fedavg": history_2}))  # doctest: +SKIP
    """
    if isinstance(runs, Sequence) and not isinstance(runs, str):
        runs = _by_method(runs)
    if not isinstance(runs, Mapping) or not runs:
        raise ConfigError(f"compare: got {runs!r:.80}; expected runs by label, e.g. {{'fedmef': history}}")
    found: dict[str, dict[int, History]] = {}
    for label, given in runs.items():
        histories = [given] if isinstance(given, History) else list(given)
        if not histories or not all(isinstance(history, History) and history.rounds for history in histories):
            raise ConfigError(f"compare: {label!r}: got {given!r:.80}; expected histories with rounds")
        found[str(label)] = {}
        for place, history in enumerate(histories):
            seed = history.settings.get("config", {}).get("seed", place)
            if seed in found[str(label)]:
                raise ConfigError(f"compare: {label!r}: got two histories of seed {seed}; expected one per seed")
            found[str(label)][seed] = history
    lengths = {len(history.rounds) for histories in found.values() for history in histories.values()}
    if len(lengths) > 1:
        raise ConfigError(
            f"compare: got runs of {', '.join(map(str, sorted(lengths)))} rounds; expected as many in each"
        )
    return MethodComparison(found)


def _by_method(histories: Sequence[History]) -> dict[str, list[History]]:
    """Histories by the names of their methods."""
    result: dict[str, list[History]] = {}
    for history in histories:
        method = history.settings.get("method") if isinstance(history, History) else None
        if not isinstance(method, dict) or not isinstance(method.get("name"), str):
            raise ConfigError(
                f"compare: got {history!r:.80} without the name of a method; expected histories of federated.run, or "
                "labels: {'first': history}"
            )
        result.setdefault(method["name"], []).append(history)
    return result


def _figures(history: History) -> dict[str, Any]:
    last = history.rounds[-1]
    return {
        "rounds": len(history.rounds),
        "test_accuracy": history.test_accuracy,
        "test_loss": last.test_loss,
        "density": last.density,
        "bytes_down": history.bytes_down,
        "bytes_up": history.bytes_up,
        "peak_saved_bytes": max(record.peak_saved_bytes for record in history.rounds),
        "seconds": history.seconds,
    }


def _row(label: str, histories: Sequence[History], accuracies: Sequence[float]) -> tuple[str, ...]:
    if not histories:
        return (label, "0", *["-"] * (len(_HEADINGS) - 2))
    figures = [_figures(history) for history in histories]
    middle = {
        key: statistics.median(values) if (values := [f[key] for f in figures if f[key] is not None]) else None
        for key in figures[0]
    }
    spread = [statistics.median(accuracies), min(accuracies), max(accuracies)] if accuracies else [None] * 3
    shown = ["-" if value is None else f"{value:.4f}" for value in (*spread, middle["test_loss"])]
    sizes = [shown_bytes(round(middle[key] or 0)) for key in ("bytes_down", "bytes_up", "peak_saved_bytes")]
    return (label, str(len(histories)), *shown, f"{middle['density']:.4f}", *sizes, f"{middle['seconds']:.1f}")


def _curves(histories: Sequence[History]) -> Curves:
    """Per round the accuracies of all seeds, and the median of the bytes sent up to it."""
    rounds = range(min((len(history.rounds) for history in histories), default=0))
    accuracies, sent = [], []
    totals = [list(itertools.accumulate(r.bytes_down + r.bytes_up for r in history.rounds)) for history in histories]
    for index in rounds:
        found = [history.rounds[index].test_accuracy for history in histories]
        accuracies.append([accuracy for accuracy in found if accuracy is not None])
        sent.append(statistics.median(total[index] for total in totals))
    return Curves(accuracies, sent)
