"""`benchmarks/gpu.py` where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")


def printed(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout  # noqa: S603


def test_without_a_gpu_nothing_is_measured():
    assert printed().startswith("not run: needs one GPU")


@pytest.mark.slow
def test_every_row_runs_in_a_tiny_form_on_the_cpu():
    lines = [line for line in printed("--tiny", "--models", "gpt2").splitlines() if "gpt2" in line]
    assert len(lines) == 8
    assert all("ran" in line and "not run" in line and "memory)" not in line for line in lines)


@pytest.mark.slow
def test_what_does_not_fit_into_the_time_is_not_run():
    lines = [line for line in printed("--tiny", "--models", "gpt2", "--minutes", "0").splitlines() if "gpt2" in line]
    assert len(lines) == 8
    assert not any(" ran " in line for line in lines)
