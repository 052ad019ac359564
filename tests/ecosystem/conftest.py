"""Surroundings of the tests with other libraries: no downloads, and torchvision where only its Python code loads."""

import importlib
import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # built for another torch: without its operators the models still work
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")

# Here, because some warn when they are imported, and each test module skips without its own.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in ("accelerate", "lightning", "opacus", "peft", "timm", "transformers"):
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(library)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Other libraries warn of each other and of torch.
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
