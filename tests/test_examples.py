"""Recipes and tutorials run as they stand; recipes that need other libraries do so in tests/ecosystem."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEED_LIBRARIES = {"accelerate_loop", "lightning_module", "lora", "timm_model"}
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


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_it_is(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert lines[0].startswith('"""')


def test_every_library_recipe_is_tested_in_its_environment() -> None:
    text = (ROOT / "tests" / "ecosystem" / "test_recipes.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in NEED_LIBRARIES)
