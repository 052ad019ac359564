"""Every test of the command line runs in a directory with models of its own."""

import sys
from pathlib import Path

import pytest

MODELS = """
import os, signal
from collections import OrderedDict
import torch
from torch import nn

print("printed while importing")

def build():
    print("printed while building")
    return nn.Sequential(OrderedDict([("first", nn.Linear(8, 6)), ("relu", nn.ReLU()), ("last", nn.Linear(6, 2))]))

def hostile():
    return nn.Sequential(OrderedDict([("\\x1b[31m[bold]", nn.Linear(8, 2)), ("<script>", nn.ReLU())]))

def needs_more(width):
    return nn.Linear(width, 2)

def no_model():
    return "a model"

def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background ignores it
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

instance = nn.Linear(2, 2)

class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x
"""


@pytest.fixture(autouse=True)
def _in_a_directory_with_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_tests.py").write_text(MODELS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "zoo_of_tests", raising=False)
