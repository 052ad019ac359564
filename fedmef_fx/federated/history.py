"""`History`: what happened in every round of a federated training, as table, JSON and plot."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Final, Self

from torch import nn

from fedmef_fx.display.notebook import fragment, html_table
from fedmef_fx.display.sizes import shown_bytes
from fedmef_fx.display.text_table import text_table
from fedmef_fx.errors import CheckpointError
from fedmef_fx.federated.client_table import client_cells
from fedmef_fx.federated.failures import Failure
from fedmef_fx.federated.history_texts import clients_csv, line_of, records_of_lines, rounds_csv
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.files.atomic import check_target, replacing

__all__ = ["History"]

_FORMAT: Final = 1


@dataclasses.dataclass(eq=False)
class History:
    """The rounds of a run and the model they led to.

    Attributes:
        rounds: What happened, in order.
        settings: What the run was started with: method, configuration, training, number of rounds, sizes of clients.
        model: The final global model, transformed and in eval mode; None in a history that was read from JSON.
        failures: Clients that were left out of a round: (round, client, reason).
    """

    rounds: list[RoundRecord] = dataclasses.field(default_factory=list)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: nn.Module | None = dataclasses.field(default=None, repr=False)
    failures: list[Failure] = dataclasses.field(default_factory=list)

    @property
    def bytes_down(self) -> int:
        """Bytes that the server sent, in all rounds."""
        return sum(record.bytes_down for record in self.rounds)

    @property
    def bytes_up(self) -> int:
        """Bytes that the clients sent, in all rounds."""
        return sum(record.bytes_up for record in self.rounds)

    @property
    def seconds(self) -> float:
        """Wall-clock time of all rounds."""
        return sum(record.seconds for record in self.rounds)

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy of the final model on the test set, 0 to 1; None without one."""
        return self.rounds[-1].test_accuracy if self.rounds else None

    def to_json(self) -> str:
        """Rounds and settings as JSON text; the model is not part of it."""
        content = {
            "format": _FORMAT,
            "settings": self.settings,
            "rounds": [record.to_dict() for record in self.rounds],
            "failures": [list(failure) for failure in self.failures],
        }
        return json.dumps(content, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: Another format, or records with missing or unknown fields.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"History.from_json: not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise CheckpointError(f"History.from_json: got another format; expected a history of format {_FORMAT}")
        rounds, settings = content.get("rounds"), content.get("settings")
        failures = content.get("failures", [])
        if not isinstance(rounds, list) or not isinstance(settings, dict) or not isinstance(failures, list):
            raise CheckpointError("History.from_json: got no rounds or settings; expected both: the file is damaged")
        return cls(
            [RoundRecord.from_dict(record) for record in rounds],
            settings,
            failures=[Failure.from_json(entry) for entry in failures],
        )

    def to_csv(self) -> str:
        """One row per round as CSV."""
        return rounds_csv(self.rounds)

    def clients_to_csv(self) -> str:
        """One row per round and client as CSV."""
        return clients_csv(self.rounds)

    def client_table(self) -> str:
        """One row per client as text: how often it took part, what it sent, how the model does on its test set."""
        headings, rows = client_cells(self.rounds, self.failures)
        return text_table(headings, rows)

    def save(self, path: str | Path) -> None:
        """Write the rounds as CSV to a .csv file, as a line of JSON each to a .jsonl file, else all as JSON.

        The file is either the old one or complete.

        Raises:
            CheckpointError: The file cannot be written.
        """
        with replacing(check_target(path, error=CheckpointError), error=CheckpointError) as temporary:
            temporary.write_text(self._text_for(Path(path).suffix.lower()), encoding="utf-8")

    def _text_for(self, suffix: str) -> str:
        if suffix == ".jsonl":
            return "".join(map(line_of, self.rounds))
        return self.to_csv() if suffix == ".csv" else self.to_json()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote as JSON, or the rounds of a .jsonl file.

        Raises:
            CheckpointError: A missing file, or one that is no history.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            if Path(path).suffix.lower() == ".jsonl":
                return cls(records_of_lines(text))
            return cls.from_json(text)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error}; expected a file that History.save wrote"
            ) from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def plot(self, path: str | Path) -> None:
        """Draw accuracy, losses, traffic, memory and churn over the rounds, as .png, .svg or .pdf by the suffix.

        Raises:
            ConfigError: matplotlib is not installed, another format, or a file that cannot be written.
        """
        from fedmef_fx.federated.plotting import plot_history  # noqa: PLC0415 - imports this module

        plot_history(self.rounds, Path(path))

    def churn(self) -> dict[str, list[int]]:
        """Parameter name -> weights that changed places in each adjustment round, in order."""
        adjusted = [record.churn for record in self.rounds if record.adjusted]
        names = dict.fromkeys(name for churn in adjusted for name in churn)
        return {name: [churn.get(name, 0) for churn in adjusted] for name in names}

    def _repr_html_(self) -> str:
        headings = ("round", "adjusted", "clients", "train loss", "test loss", "accuracy", "density", "down", "up")
        rows = [_cells(record) for record in self.rounds]
        tables = [html_table((*headings, "saved peak", "seconds"), rows, left={1}, caption=self._caption())]
        if churn := self.churn():
            adjusted = [f"round {record.round_index}" for record in self.rounds if record.adjusted]
            moved = [(name, *map(str, counts)) for name, counts in churn.items()]
            tables.append(html_table(("weights moved", *adjusted), moved, left={0}))
        if any(record.by_client for record in self.rounds):
            tables.append(html_table(*client_cells(self.rounds, self.failures), left=set()))
        return fragment(*tables)

    def _caption(self) -> str:
        sent = f"{shown_bytes(self.bytes_down)} down, {shown_bytes(self.bytes_up)} up"
        return f"{len(self.rounds)} rounds, {sent}, {self.seconds:.2f} s"

    def __str__(self) -> str:
        lines = ["round  adj  clients  train loss  test loss  accuracy  density     down       up  saved peak  seconds"]
        lines += [_line(record) for record in self.rounds]
        total = f"{shown_bytes(self.bytes_down):>9s}{shown_bytes(self.bytes_up):>9s}{'':12s}{self.seconds:9.2f}"
        return "\n".join([*lines, f"{'total':61s}{total}"])


def _cells(record: RoundRecord) -> tuple[str, ...]:
    return (
        str(record.round_index),
        "*" if record.adjusted else "",
        str(len(record.clients)),
        f"{record.train_loss:.4f}",
        "-" if record.test_loss is None else f"{record.test_loss:.4f}",
        "-" if record.test_accuracy is None else f"{record.test_accuracy:.4f}",
        f"{record.density:.4f}",
        shown_bytes(record.bytes_down),
        shown_bytes(record.bytes_up),
        shown_bytes(record.peak_saved_bytes),
        f"{record.seconds:.2f}",
    )


def _line(record: RoundRecord) -> str:
    test_loss = "-" if record.test_loss is None else f"{record.test_loss:.4f}"
    accuracy = "-" if record.test_accuracy is None else f"{record.test_accuracy:.4f}"
    return (
        f"{record.round_index:5d}{'*' if record.adjusted else '':>5s}{len(record.clients):9d}{record.train_loss:12.4f}"
        f"{test_loss:>11s}{accuracy:>10s}{record.density:9.4f}"
        f"{shown_bytes(record.bytes_down):>9s}{shown_bytes(record.bytes_up):>9s}{shown_bytes(record.peak_saved_bytes):>12s}"
        f"{record.seconds:9.2f}"
    )
