"""The recipes in examples/ that need other libraries run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("accelerate_loop", "accelerate"),
        ("lightning_module", "lightning"),
        ("lora", "peft"),
        ("tensorboard_curves", "tensorboard"),
        ("timm_model", "timm"),
        ("transformers_trainer", "transformers"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_recipe_runs(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "density" in capsys.readouterr().out
