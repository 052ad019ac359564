"""Histories as CSV, lines of JSON, tables of clients and scalars; runs side by side by the names of their methods."""

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated import Failure, History, JsonLines, LocalTraining, RoundRecord, TensorBoard, compare, run

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.4, adjustment_interval=1)


def _record(index: int, **fields: Any) -> RoundRecord:
    counts: dict[str, Any] = dict.fromkeys(("bytes_down", "bytes_up", "peak_saved_bytes"), 10)
    defaults: dict[str, Any] = {"test_loss": None, "test_accuracy": 0.5, "train_loss": 1.5, "clients": (0, 2)}
    return RoundRecord(round_index=index, adjusted=False, density=0.5, seconds=0.25, **{**defaults, **counts, **fields})


HISTORY = History(
    [
        _record(
            0,
            metrics={"f1": 0.25},
            by_client={
                0: {"samples": 5, "loss": 2.0, "bytes_down": 100, "bytes_up": 50, "peak_saved_bytes": 9},
                2: {"samples": 7, "loss": 1.0, "bytes_down": 100, "bytes_up": 60, "peak_saved_bytes": 11, "age": 3.0},
            },
            churn={"a": 2, "b": 3},
        ),
        _record(
            1,
            train_loss=math.nan,
            by_client={0: {"samples": 5, "loss": 1.0, "bytes_down": 80, "bytes_up": 50, "peak_saved_bytes": 30}},
        ),
    ],
    {"method": {"name": "fedmef"}, "config": {"seed": 0}},
    failures=[Failure(1, 2, "late: took 9 s"), Failure(1, 7, "raised: KeyError")],
)


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_rounds_as_csv(tmp_path: Path) -> None:
    HISTORY.save(tmp_path / "history.csv")
    first, second = _rows((tmp_path / "history.csv").read_text())
    assert (first["round_index"], first["clients"], first["moved"], first["f1"]) == ("0", "2", "5", "0.25")
    assert (first["test_loss"], second["f1"], second["train_loss"]) == ("", "", "nan")


def test_clients_as_csv() -> None:
    rows = _rows(HISTORY.clients_to_csv())
    assert [(row["round_index"], row["client"], row["age"]) for row in rows] == [
        ("0", "0", ""),
        ("0", "2", "3.0"),
        ("1", "0", ""),
    ]


def test_a_table_of_clients() -> None:
    head, *lines = (line.split() for line in HISTORY.client_table().splitlines())
    assert head[:4] == ["client", "rounds", "failed", "samples"]
    assert [line[:4] for line in lines] == [["0", "2", "0", "5"], ["2", "1", "1", "7"], ["7", "0", "1", "-"]]
    assert lines[0][4:6] == ["1.5000", "1.0000"]
    assert lines[0][6:8] == ["180", "B"]
    assert lines[1][-1] == "3"
    assert HISTORY._repr_html_().count("<table") == 2
    assert "client" in History().client_table()


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    HISTORY.save(path)
    assert [json.loads(line)["round_index"] for line in path.read_text().splitlines()] == [0, 1]
    read = History.load(path)
    assert read.rounds[0] == HISTORY.rounds[0]
    assert math.isnan(read.rounds[1].train_loss)
    path.write_text(path.read_text() + '{"round_index": 2}\n')
    with pytest.raises(CheckpointError, match=r"history\.jsonl: line 3: got"):
        History.load(path)


def _play(network: nn.Module, clients: list[TensorDataset], **options: Any) -> History:
    return run(network, clients, CONFIG, training=FAST, **{"rounds": 3, **options})


def test_lines_are_written_while_a_run_goes_on(
    network: nn.Module, clients: list[TensorDataset], tmp_path: Path
) -> None:
    path = tmp_path / "rounds.jsonl"

    def killed_between(record: RoundRecord, server: Any) -> None:
        if record.round_index == 1:
            raise KeyboardInterrupt  # after the checkpoint, before the line

    with pytest.raises(KeyboardInterrupt):
        _play(network, clients, on_round=[killed_between, JsonLines(path)], checkpoint_dir=tmp_path)
    assert len(path.read_text().splitlines()) == 1
    history = _play(network, clients, on_round=JsonLines(path), checkpoint_dir=tmp_path)
    assert History.load(path).rounds == history.rounds
    _play(network, clients, on_round=JsonLines(path), rounds=1)
    assert len(path.read_text().splitlines()) == 1


def test_lines_that_cannot_be_written(network: nn.Module, clients: list[TensorDataset], tmp_path: Path) -> None:
    callback = JsonLines(tmp_path / "rounds.jsonl")
    (tmp_path / "rounds.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"rounds\.jsonl: cannot be written"):
        _play(network, clients, on_round=callback, rounds=1)


def test_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  # an extra

    callback: Any = TensorBoard(tmp_path, clients=True)
    for record in HISTORY.rounds:
        callback(record, None)
    callback.on_resume(HISTORY.rounds[:1], None)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert {"train_loss", "test_accuracy", "metrics/f1", "client 2/age"} <= set(found.Tags()["scalars"])
    assert [(event.step, event.value) for event in found.Scalars("train_loss")] == [(0, 1.5)]
    assert [event.step for event in found.Scalars("density")] == [0]


def test_scalars_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install fedmef-fx\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_runs_are_called_by_their_methods(tmp_path: Path) -> None:
    def history(method: str, seed: int) -> History:
        return History([_record(0), _record(1)], {"method": {"name": method}, "config": {"seed": seed}})

    found = compare([history("fedmef", 0), history("fedavg", 0), history("fedmef", 1)])
    assert {label: list(runs) for label, runs in found.runs.items()} == {"fedmef": [0, 1], "fedavg": [0]}
    found.plot(tmp_path / "runs.svg")
    assert "fedavg" in (tmp_path / "runs.svg").read_text()
    with pytest.raises(ConfigError, match="without the name of a method"):
        compare([History([_record(0)])])
    with pytest.raises(ConfigError, match="expected runs by label"):
        compare([])
