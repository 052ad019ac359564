"""`benchmarks/gpu.py` where there is no GPU."""

from pathlib import Path

import pytest
import torch

from tests import forked

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")


def printed(folder: Path, *arguments: str) -> str:
    script = (
        "import runpy, sys; sys.path.insert(0, 'benchmarks'); runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    path = {"PYTHONPATH": str(forked.ROOT)}  # for processes that it starts itself
    done = forked.run(script, *arguments, folder=folder, environment=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_gpu_nothing_is_measured(tmp_path):
    assert printed(tmp_path).startswith("not run: needs one GPU")


@pytest.mark.slow
def test_every_row_runs_in_a_tiny_form_on_the_cpu(tmp_path):
    lines = [line for line in printed(tmp_path, "--tiny", "--models", "gpt2").splitlines() if "gpt2" in line]
    assert len(lines) == 8
    assert all("ran" in line and "not run" in line and "memory)" not in line for line in lines)


@pytest.mark.slow
def test_what_does_not_fit_into_the_time_is_not_run(tmp_path):
    shown = printed(tmp_path, "--tiny", "--models", "gpt2", "--minutes", "0")
    lines = [line for line in shown.splitlines() if "gpt2" in line]
    assert len(lines) == 8
    assert not any(" ran " in line for line in lines)
