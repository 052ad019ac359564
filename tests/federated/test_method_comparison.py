"""Comparisons: tables from histories, cells that go on after an interruption, and what a wrong call is told."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import CheckpointError, ConfigError, FedmefError
from fedmef_fx.federated import (
    Contender,
    History,
    LocalTraining,
    MethodComparison,
    RoundRecord,
    compare,
    compare_methods,
    run,
)

FAST = LocalTraining(batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.3, adjustment_interval=2, weight_storage="dense")


def _history(accuracies: list[float | None], *, seed: int = 0) -> History:
    rounds = [
        RoundRecord(
            round_index=index,
            adjusted=False,
            clients=(0, 1),
            train_loss=1.0,
            test_loss=None if accuracy is None else 0.5,
            test_accuracy=accuracy,
            density=0.25,
            bytes_down=1000,
            bytes_up=500,
            seconds=2.0,
            peak_saved_bytes=100 * (index + 1),
        )
        for index, accuracy in enumerate(accuracies)
    ]
    return History(rounds, {"config": {"seed": seed}})


def _two() -> MethodComparison:
    return compare({"a": [_history([0.5, 0.6]), _history([0.5, 0.9], seed=1)], "b|c": _history([None, None])})


def test_the_table_has_medians_and_the_range_of_the_seeds() -> None:
    headings, rows = _two().cells()
    first = dict(zip(headings, rows[0], strict=True))
    assert (first["run"], first["seeds"]) == ("a", "2")
    assert (first["accuracy"], first["lowest"], first["highest"]) == ("0.7500", "0.6000", "0.9000")
    assert (first["down"], first["up"], first["seconds"]) == ("2.0 kB", "1.0 kB", "4.0")
    assert dict(zip(headings, rows[1], strict=True))["accuracy"] == "-"
    assert str(_two()).count("\n") == 2


def test_markdown_is_one_table_whatever_labels_hold() -> None:
    lines = _two().to_markdown().strip().split("\n")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {12}
    assert lines[3].startswith(r"| b\|c |")


def test_csv_has_every_round() -> None:
    rows = list(csv.DictReader(io.StringIO(_two().to_csv())))
    assert [(row["run"], row["seed"], row["round_index"]) for row in rows[:3]] == [
        ("a", "0", "0"),
        ("a", "0", "1"),
        ("a", "1", "0"),
    ]
    assert float(rows[3]["test_accuracy"]) == 0.9
    assert rows[4]["test_accuracy"] == ""


@pytest.mark.parametrize("name", ["table.md", "rounds.csv", "runs.json", "curves.png", "curves.svg"])
def test_files_are_written_whole_and_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    _two().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize("name", ["curves.bmp", "curves", "missing/table.md"])
def test_files_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected|no directory"):
        _two().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "expected runs by label"),
        ([], "expected runs by label"),
        ({"a": []}, "'a': got .*expected histories with rounds"),
        ({"a": History()}, "expected histories with rounds"),
        ({"a": ["history"]}, "expected histories with rounds"),
        ({"a": [_history([0.5]), _history([0.6])]}, "two histories of seed 0"),
        ({"a": _history([0.5]), "b": _history([0.5, 0.6])}, "runs of 1, 2 rounds"),
    ],
)
def test_what_cannot_be_compared(runs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(runs)


Runner = Callable[..., MethodComparison]


@pytest.fixture
def start(network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset) -> Runner:
    def call(methods: Any = ("fedmef", "fedavg"), **changes: Any) -> MethodComparison:
        options: dict[str, Any] = {"rounds": 3, "training": FAST, "test": test_set, **changes}
        return compare_methods(
            options.pop("model", network), options.pop("clients", clients), methods, CONFIG, **options
        )

    return call


def _rounds(history: History) -> list[RoundRecord]:
    return [dataclasses.replace(record, seconds=0.0) for record in history.rounds]


def test_a_cell_is_the_run_of_its_method_and_seed(
    start: Runner, network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset
) -> None:
    found = start(seeds=(0, 7))
    assert {label: list(histories) for label, histories in found.runs.items()} == {"fedmef": [0, 7], "fedavg": [0, 7]}
    alone = run(network, clients, CONFIG.replace(seed=7), rounds=3, training=FAST, test=test_set, method="fedavg")
    assert _rounds(found.runs["fedavg"][7]) == _rounds(alone)


def test_contenders_have_configurations_of_their_own(start: Runner) -> None:
    contender = Contender(
        label="FedMef, half", config=Config(density=0.5, weight_storage="dense"), training=LocalTraining(batch_size=9)
    )
    found = start(["fedmef", contender])
    histories = found.runs["FedMef, half"][0], found.runs["fedmef"][0]
    assert [history.settings["config"]["density"] for history in histories] == [0.5, 0.3]
    assert [history.settings["training"]["batch_size"] for history in histories] == [9, 8]


def test_models_and_clients_can_depend_on_the_seed(start: Runner, clients: list[TensorDataset]) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))
        return made[-1]

    asked: list[int] = []

    def of(seed: int) -> list[TensorDataset]:
        asked.append(seed)
        return clients[: 2 + seed]

    found = start(model=make, clients=of, seeds=(0, 1), rounds=1)
    assert asked == [0, 1]
    assert [len(found.runs["fedavg"][seed].rounds[0].clients) for seed in (0, 1)] == [2, 3]
    weights = [model.get_parameter("1.weight") for model in made]
    assert bool((weights[0] == weights[1]).all())
    assert not bool((weights[0] == weights[2]).all())


class _KilledError(BaseException):
    """Stands for the end of the process."""


def test_an_interrupted_comparison_goes_on_in_the_round_where_it_was(start: Runner, tmp_path: Path) -> None:
    expected = start(seeds=(0, 1))
    seen: list[tuple[str, int, int]] = []

    def kill(label: str, seed: int, record: RoundRecord) -> None:
        seen.append((label, seed, record.round_index))
        if len(seen) == 5:
            raise _KilledError

    with pytest.raises(_KilledError):
        start(seeds=(0, 1), directory=tmp_path, progress=kill)
    found = start(
        seeds=(0, 1), directory=tmp_path, progress=lambda *what: seen.append((*what[:2], what[2].round_index))
    )
    assert seen == [(label, seed, index) for seed in (0, 1) for label in ("fedmef", "fedavg") for index in range(3)]
    for label, histories in expected.runs.items():
        for seed, history in histories.items():
            assert _rounds(found.runs[label][seed]) == _rounds(history)
    again = start(seeds=(0, 1), directory=tmp_path, resume=False)
    assert _rounds(again.runs["fedmef"][1]) == _rounds(expected.runs["fedmef"][1])


def test_cells_of_another_comparison_are_not_taken(start: Runner, tmp_path: Path) -> None:
    start(directory=tmp_path, rounds=1)
    with pytest.raises(CheckpointError, match=r"belongs to another run: rounds: got 2, the checkpoint has 1"):
        start(directory=tmp_path, rounds=2)


def test_a_cell_that_fails_is_noted_and_the_others_go_on(start: Runner) -> None:
    wild = Contender(label="wild", training=LocalTraining(batch_size=8, learning_rate=1e20))
    found = start([wild, "fedavg"])
    assert list(found.runs["fedavg"]) == [0]
    assert not found.runs["wild"]
    assert "training has diverged" in found.failures["wild"][0]
    assert "wild, seed 0: failed" in str(found)
    assert json.loads(found.to_json())["failures"]["wild"]["0"] == found.failures["wild"][0]
    with pytest.raises(ConfigError, match="every cell failed; wild, seed 0: "):
        start([wild])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": "fedmef"}, "methods: got 'fedmef'; expected several"),
        ({"methods": []}, "methods: got"),
        ({"methods": ["fedprox"]}, "method: got 'fedprox'"),
        ({"methods": ["fedmef", "fedmef"]}, "labels that differ"),
        ({"methods": [Contender(label="a b"), Contender(label="A-B")]}, "labels that differ"),
        ({"methods": [Contender(label="?")]}, "labels that differ"),
        ({"seeds": ()}, "seeds: got"),
        ({"seeds": (0, 0)}, "different integers"),
        ({"seeds": (-1,)}, "different integers"),
        ({"seeds": (0.5,)}, "different integers"),
        ({"seeds": "01"}, "different integers"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"clients": []}, "got no clients"),
        ({"model": lambda: "a model"}, r"model\(\) returned a str"),
    ],
)
def test_wrong_calls_say_what_is_wrong(start: Runner, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FedmefError, match=message):
        start(**changes)
