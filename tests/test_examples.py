"""Recipes and tutorials run as they stand; recipes that need other libraries do so in tests/ecosystem."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_the_recipe_for_several_processes_runs_in_two(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(  # noqa: S603  # a fixed program
        [*launch, str(ROOT / "examples" / "ddp_training.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 processes, density 0.2")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert lines[0].startswith('"""')


def test_every_library_recipe_is_tested_in_its_environment() -> None:
    text = (ROOT / "tests" / "ecosystem" / "test_recipes.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in NEED_LIBRARIES)
