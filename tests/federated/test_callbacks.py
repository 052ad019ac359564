"""What is done after every round: early stopping, the best model, functions of one's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated import Callback, EarlyStopping, History, KeepBest, LocalTraining, RoundRecord, Server, run

FAST = LocalTraining(epochs=1, batch_size=8, learning_rate=0.02)
CONFIG = Config(density=0.4, adjustment_interval=2)


def _record(index: int, **fields: Any) -> RoundRecord:
    defaults: dict[str, Any] = {"test_loss": None, "test_accuracy": None, "train_loss": 1.0, "clients": (0,)}
    counts = dict.fromkeys(("bytes_down", "bytes_up", "peak_saved_bytes"), 0)
    return RoundRecord(round_index=index, adjusted=False, density=0.5, seconds=0.0, **{**defaults, **counts, **fields})


NOBODY: Any = None


def _ended(stopping: EarlyStopping, losses: list[float | None]) -> int | None:
    """After which round a run with these test losses ends."""
    for index, loss in enumerate(losses):
        if stopping(_record(index, test_loss=loss), NOBODY):
            return index
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "least", "end"),
    [
        ([3, 2, 1, 0], 1, 0.0, None),
        ([3, 2, 2, 2], 2, 0.0, 3),
        ([3, 2, None, None, 2, 2], 2, 0.0, 5),
        ([3, 2.9, 2.8, 2.7], 2, 0.5, 2),
        ([float("nan"), 3, 4, 5], 2, 0.0, 3),
        ([1, 2, 0.5, 2, 2], 2, 0.0, 4),
    ],
)
def test_when_a_run_ends(losses: list[Any], patience: int, least: float, end: int | None) -> None:
    assert _ended(EarlyStopping(patience=patience, least=least), losses) == end


def test_accuracies_should_be_high() -> None:
    stopping = EarlyStopping("test_accuracy", patience=1)
    assert not stopping(_record(0, test_accuracy=0.5), NOBODY)
    assert not stopping(_record(1, test_accuracy=0.6), NOBODY)
    assert stopping(_record(2, test_accuracy=0.6), NOBODY)
    own = EarlyStopping("distance", patience=1, higher_is_better=False)
    assert not own(_record(0, metrics={"distance": 2.0}), NOBODY)
    assert own(_record(1, metrics={"distance": 3.0}), NOBODY)


def test_a_number_that_no_round_has() -> None:
    with pytest.raises(ConfigError, match=r"EarlyStopping: by: got 'accuracy'.*test_accuracy, f1"):
        EarlyStopping("accuracy")(_record(0, test_loss=1.0, metrics={"f1": 0.5}), NOBODY)


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": 1.5}, {"least": -1.0}, {"least": float("nan")}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"EarlyStopping: {next(iter(options))}"):
        EarlyStopping(**options)


def _play(network: nn.Module, clients: list[TensorDataset], test: TensorDataset, **options: Any) -> History:
    return run(network, clients, CONFIG, training=FAST, test=test, **{"rounds": 4, **options})


def test_a_run_that_was_stopped_stays_so(
    network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset, tmp_path: Path
) -> None:
    # Nothing is better by a million.
    stopping = EarlyStopping(patience=1, least=1e6)
    history = _play(network, clients, test_set, on_round=stopping, checkpoint_dir=tmp_path)
    assert len(history.rounds) == 2
    again = _play(network, clients, test_set, on_round=stopping, checkpoint_dir=tmp_path)
    assert len(again.rounds) == 2
    # Without it the run goes on.
    assert len(_play(network, clients, test_set, checkpoint_dir=tmp_path, rounds=3).rounds) == 3


def test_the_best_model_is_kept(
    network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset, tmp_path: Path
) -> None:
    states: list[dict[str, torch.Tensor]] = []

    def note(record: RoundRecord, server: Server) -> None:
        states.append({name: value.clone() for name, value in server.model.state_dict().items()})

    # The first round has the highest training loss.
    best, worst = KeepBest("test_loss"), KeepBest("train_loss", higher_is_better=True, directory=tmp_path)
    with pytest.raises(ConfigError, match="no round had a number 'test_loss'"):
        best.model()
    history = _play(network, clients, test_set, on_round=[best, worst, note], checkpoint_dir=tmp_path, rounds=3)
    for kept, losses in (
        (best, [-(r.test_loss or 0.0) for r in history.rounds]),
        (worst, [r.train_loss for r in history.rounds]),
    ):
        index = losses.index(max(losses))
        assert kept.record == history.rounds[index]
        model = kept.model()
        assert not model.training
        assert all(torch.equal(value, states[index][name]) for name, value in model.state_dict().items())
    # It survives an interruption.
    after = KeepBest("train_loss", higher_is_better=True, directory=tmp_path)
    longer = _play(network, clients, test_set, on_round=after, checkpoint_dir=tmp_path, rounds=4)
    assert after.record == longer.rounds[0]
    assert all(torch.equal(value, states[0][name]) for name, value in after.model().state_dict().items())


def test_callbacks_of_ones_own(
    network: nn.Module, clients: list[TensorDataset], test_set: TensorDataset, tmp_path: Path
) -> None:
    class _Noting(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def on_resume(self, rounds: Any, server: Server) -> bool:
            self.seen = [-1 - record.round_index for record in rounds]
            return False

        def __call__(self, record: RoundRecord, server: Server) -> bool:
            assert server.state.version == record.round_index + 1
            self.seen.append(record.round_index)
            return record.round_index == 1

    noting = _Noting()
    assert len(_play(network, clients, test_set, on_round=noting, checkpoint_dir=tmp_path).rounds) == 2
    _play(network, clients, test_set, on_round=[noting], checkpoint_dir=tmp_path, rounds=3)
    assert noting.seen == [-1, -2, 2]
    # What functions give is looked at only where it is True.
    assert len(_play(network, clients, test_set, on_round=lambda record, server: "go on").rounds) == 4
