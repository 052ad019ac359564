"""The README's Python runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)

    def images(count: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 1, 8, 8), torch.randint(0, 10, (count,)))

    # What the text leaves to the reader: data sets, and fewer rounds than a real run has.
    names = {"clients": [images(12), images(7)], "test_set": images(20)}
    for block in blocks:
        shorter = block.replace("rounds=50", "rounds=2").replace("range(100)", "range(3)")
        exec(compile(shorter, str(README), "exec"), names)  # noqa: S102 -- our own text
    assert (tmp_path / "model.onnx").stat().st_size > 0
    assert (tmp_path / "model.safetensors").stat().st_size > 0
    assert (tmp_path / "model.html").stat().st_size > 0
    assert len(names["history"].rounds) == 2  # type: ignore[attr-defined]  # made by the last block


def test_all_commands_are_named() -> None:
    command = [sys.executable, "-m", "fedmef_fx", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603  # our own program
    listed = re.findall(r"^  ([a-z-]+)  ", shown.partition("Commands:")[2], flags=re.MULTILINE)
    (named,) = re.findall(r"`fedmef-fx ([a-z-]+(?:\s*\|\s*[a-z-]+)+)`", README.read_text(encoding="utf-8"))
    assert re.split(r"\s*\|\s*", named) == listed
