"""Histories as table, JSON and picture."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fedmef_fx.errors import CheckpointError, ConfigError
from fedmef_fx.federated import History, RoundRecord


def _record(round_index: int, **changes: object) -> RoundRecord:
    record = RoundRecord(
        round_index=round_index,
        adjusted=False,
        clients=(0, 2),
        train_loss=1.25,
        test_loss=0.5,
        test_accuracy=0.75,
        density=0.1,
        bytes_down=12_345,
        bytes_up=2_000_000,
        seconds=0.5,
        peak_saved_bytes=999,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]  # fields of the record


@pytest.fixture
def history() -> History:
    adjusted = _record(1, adjusted=True, churn={"conv.weight": 4}, test_loss=None, test_accuracy=None)
    return History([_record(0), adjusted, _record(2, test_accuracy=0.9)], {"method": {"name": "fedmef"}, "rounds": 3})


def test_json_survives(history: History, tmp_path: Path) -> None:
    read = History.from_json(history.to_json())
    assert read.rounds == history.rounds
    assert read.settings == history.settings
    assert read.model is None
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json").rounds == history.rounds
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_sums(history: History) -> None:
    assert (history.bytes_down, history.bytes_up, history.seconds) == (37_035, 6_000_000, 1.5)
    assert history.test_accuracy == 0.9
    assert History().test_accuracy is None


def test_the_table(history: History) -> None:
    assert str(history).splitlines() == [
        "round  adj  clients  train loss  test loss  accuracy  density     down       up  saved peak  seconds",
        "    0             2      1.2500     0.5000    0.7500   0.1000  12.3 kB   2.0 MB       999 B     0.50",
        "    1    *        2      1.2500          -         -   0.1000  12.3 kB   2.0 MB       999 B     0.50",
        "    2             2      1.2500     0.5000    0.9000   0.1000  12.3 kB   2.0 MB       999 B     0.50",
        "total                                                          37.0 kB   6.0 MB                 1.50",
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(history: History, tmp_path: Path, suffix: str) -> None:
    history.plot(tmp_path / f"history.{suffix}")
    assert (tmp_path / f"history.{suffix}").stat().st_size > 1000


def test_plots_that_cannot_be_written(history: History, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"History\.plot: .*history\.xyz"):
        history.plot(tmp_path / "history.xyz")
    with pytest.raises(ConfigError, match=r"History\.plot: .*missing"):
        history.plot(tmp_path / "missing" / "history.png")


def test_plotting_without_matplotlib(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fedmef_fx.federated.plotting", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'fedmef-fx\[viz\]'"):
        history.plot(tmp_path / "history.png")


def test_churn_by_layer(history: History) -> None:
    history.rounds.append(_record(3, adjusted=True, churn={"conv.weight": 2, "fc.weight": 1}))
    assert history.churn() == {"conv.weight": [4, 2], "fc.weight": [0, 1]}


def test_a_notebook_shows_rounds_and_churn(history: History) -> None:
    name = "<script>alert(1)</script>"
    history.rounds.append(_record(3, adjusted=True, churn={"conv.weight": 2, name: 1}))
    page = history._repr_html_()
    assert page.count("<tr>") == 1 + 4 + 1 + 2
    assert "<script" not in page
    assert "37.0 kB" not in page, "four rounds by now"
    assert "49.4 kB down" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "another format"),
        ('{"format": 2}', "another format"),
        ('{"format": 1}', "no rounds or settings"),
        ('{"format": 1, "settings": {}, "rounds": [1]}', "round record: got 1"),
    ],
)
def test_what_is_no_history(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        History.from_json(text)
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"history\.json"):
        History.load(tmp_path / "history.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round_index", 0.5),
        ("adjusted", 1),
        ("clients", [0.5]),
        ("clients", 3),
        ("train_loss", "1"),
        ("test_loss", "1"),
        ("churn", {"a": 0.5}),
        ("churn", []),
    ],
)
def test_records_of_the_wrong_type(field: str, value: object, history: History) -> None:
    content = json.loads(history.to_json())
    content["rounds"][1][field] = value
    with pytest.raises(CheckpointError, match=field):
        History.from_json(json.dumps(content))


def test_files_that_cannot_be_read_or_written(history: History, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        History.load(tmp_path / "missing.json")
    with pytest.raises(CheckpointError, match="no directory"):
        history.save(tmp_path / "missing" / "history.json")
