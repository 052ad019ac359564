"""Histories as CSV and as lines of JSON: for spreadsheets, dataframes and logs."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import Final

from fedmef_fx.errors import CheckpointError
from fedmef_fx.federated.rounds import RoundRecord

__all__ = ["clients_csv", "line_of", "records_of_lines", "rounds_csv"]

_PLAIN: Final = tuple(
    field.name
    for field in dataclasses.fields(RoundRecord)
    if field.name not in ("clients", "churn", "metrics", "by_client")
)


def rounds_csv(rounds: Sequence[RoundRecord]) -> str:
    """One row per round: fields, number of clients, weights that moved, and metrics; empty where there is none."""
    metrics = list(dict.fromkeys(name for record in rounds for name in record.metrics))
    rows = [
        [
            *(getattr(record, name) for name in _PLAIN),
            len(record.clients),
            sum(record.churn.values()),
            *(record.metrics.get(name) for name in metrics),
        ]
        for record in rounds
    ]
    return _csv([[*_PLAIN, "clients", "moved", *metrics], *rows])


def clients_csv(rounds: Sequence[RoundRecord]) -> str:
    """One row per round and client, with all numbers of it; empty where there is none."""
    names = list(dict.fromkeys(n for record in rounds for numbers in record.by_client.values() for n in numbers))
    rows = [
        [record.round_index, client, *(numbers.get(name) for name in names)]
        for record in rounds
        for client, numbers in record.by_client.items()
    ]
    return _csv([["round_index", "client", *names], *rows])


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def line_of(record: RoundRecord) -> str:
    """A round as one line of JSON."""
    return json.dumps(record.to_dict(), allow_nan=False) + "\n"


def records_of_lines(text: str) -> list[RoundRecord]:
    """Rounds of lines of JSON.

    Raises:
        CheckpointError: A line that is no round; the message names it.
    """
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(RoundRecord.from_dict(json.loads(line)))
        except (ValueError, RecursionError, CheckpointError) as error:
            raise CheckpointError(
                f"line {number}: got {line!r:.80}; expected a round as JSON: {error!s:.200}"
            ) from error
    return records
