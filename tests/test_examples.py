"""Recipes and tutorials run as they stand; recipes that need other libraries do so in tests/ecosystem."""

import os
import runpy
import socket
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEED_LIBRARIES = {
    "accelerate_loop",
    "lightning_module",
    "lora",
    "tensorboard_curves",
    "timm_model",
    "transformers_trainer",
}
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [*(path for path in EXAMPLES if path.stem not in NEED_LIBRARIES), *TUTORIALS], ids=lambda path: path.stem
)
def test_a_script_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


def run_as_torchrun_does(rank: int, script: str, port: int) -> None:
    """Says by the variables of torchrun who and where the processes are."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runpy.run_path(script, run_name="__main__")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_the_recipe_for_several_processes_runs_in_two(tmp_path: Path) -> None:
    forked.run_in_two(run_as_torchrun_does, ROOT / "examples" / "ddp_training.py", free_port(), folder=tmp_path)
    assert (tmp_path / "forked.stdout").read_text(encoding="utf-8").startswith("2 processes, density 0.2")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert lines[0].startswith('"""')


def test_every_library_recipe_is_tested_in_its_environment() -> None:
    text = (ROOT / "tests" / "ecosystem" / "test_recipes.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in NEED_LIBRARIES)
