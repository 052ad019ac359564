"""The demo of the documentation runs an exported file where there is no torch, no onnx and no fedmef_fx."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmef_fx import Config, export_onnx, freeze, transform
from fedmef_fx.models import digits_cnn

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "docs" / "edge_demo.py"
# Whatever is not numpy, onnxruntime or the standard library cannot be imported there.
ALONE = (
    "import sys\n"
    "for name in ('torch', 'onnx', 'onnxscript', 'fedmef_fx', 'scipy', 'pandas'): sys.modules[name] = None\n"
    "import runpy\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-W", "error", "-c", ALONE, str(DEMO), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603  # our own script


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("edge") / "model.onnx"
    sparse = transform(digits_cnn(), Config(density=0.1))
    images = torch.randn(4, 1, 8, 8)
    export_onnx(sparse, path, example_inputs=(images,), weights="packed")
    np.save(path.parent / "images.npy", images.numpy())
    with torch.no_grad():
        np.save(path.parent / "classes.npy", freeze(sparse)(images).argmax(1).numpy())
    return path


def test_it_classifies_like_the_model(model_file: Path) -> None:
    done = _run("model.onnx", "images.npy", cwd=model_file.parent)

    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"(\d+) bytes, [\d.]+ ms, classes \[([\d, ]+)\]\n", done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) == model_file.stat().st_size
    assert [int(n) for n in found[2].split(",")] == np.load(model_file.parent / "classes.npy").tolist()


def test_it_makes_an_input_of_its_own_and_finds_damage(model_file: Path, tmp_path: Path) -> None:
    done = _run(str(model_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    data = bytearray(model_file.read_bytes())
    data[len(data) // 2] ^= 16
    (tmp_path / "damaged.onnx").write_bytes(data)
    damaged = _run("damaged.onnx", cwd=tmp_path)
    assert damaged.returncode == 1
    assert damaged.stderr == "damaged.onnx is damaged\n"


def test_it_is_short_and_shown_in_the_documentation() -> None:
    text = DEMO.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"```python\n{text}```" in (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
