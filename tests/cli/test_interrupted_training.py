"""Ctrl-C while `fedmef-fx train` runs: one line that says how to go on, and a run that does."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmef_fx.commands import train
from fedmef_fx.federated import RoundRecord
from tests.cli.program import invoke, json_of

ARGUMENTS = ["train", "--rounds", "2", "--clients", "20", "--clients-per-round", "1", "--output", "run"]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that runs tests in the background lets programs ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _interrupts(record: RoundRecord) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return str(record)


def _last_line(arguments: list[str]) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr.splitlines()[-1])


@pytest.mark.parametrize(("extra", "command"), [([], "the same command"), (["--restart"], "the same command, without")])
def test_one_line_says_how_to_go_on(
    extra: list[str], command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train, "round_note", _interrupts)
        line = _last_line([*ARGUMENTS, *extra])
    assert line.startswith(f"interrupted: {command}")
    assert line.endswith(f"saved in {Path('run', 'rounds')}")
    seen: list[int] = []
    patched: Callable[[RoundRecord], str] = lambda record: str(seen.append(record.round_index))  # noqa: E731
    monkeypatch.setattr(train, "round_note", patched)
    assert json_of(*ARGUMENTS)["rounds"] == 2
    assert seen == [1]


def test_before_the_first_round_there_is_nothing_to_go_on_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()

    monkeypatch.setattr(train, "run", interrupted)
    assert _last_line(ARGUMENTS) == "interrupted: before the first round was finished: nothing was saved"
