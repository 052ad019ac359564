"""What every test shares: hypothesis profiles, a fixed torch seed, and the reasons for which tests are skipped."""

import contextlib
import copy
import functools
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton reads it when it is imported, as the next import does: its kernels run in its interpreter then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fedmef_fx.native import why_missing

# A first example can be slow because torch compiles or allocates something, so a deadline would fail at random.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_configure() -> None:
    # The order in which torch adds up floats depends on the number of threads: the same everywhere. One, because tests
    # run in as many processes as there are cores, and threads of several processes wait for each other.
    torch.set_num_threads(1)
    gc.disable()  # until `pytest_collection_finish`


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    gc.set_threshold(5000, 10, 10)  # rarer than by default: torch.fx makes very many small objects
    if "onnxruntime" in sys.modules:  # some test may export
        for read_once in (_read_translations_once, _list_operators_once):
            with contextlib.suppress(ImportError, AttributeError):  # torch's own names, which may change
                read_once()


def _read_translations_once() -> None:
    """Have torch's exporter read how operators become ONNX once per process: half the time of a small export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # noqa: PLC0415 -- only where a test exports

    made = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*arguments: object, **options: object) -> ONNXRegistry:
        known = made(*arguments, **options)
        registry = copy.copy(known)  # exports add to theirs
        registry.functions = {target: list(translations) for target, translations in known.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign,assignment]


def _list_operators_once() -> None:
    """Have torch's exporter look up all operators in C++ once per process, which it does some 60 times in an export."""
    from torch._export import utils  # noqa: PLC0415 -- only where a test exports

    utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device and a CUDA build of torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip_gpu)


@pytest.fixture(autouse=True)
def _fixed_torch_seed() -> None:
    """Tests run in random order; what one draws must not change what the next one gets."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # torch.manual_seed keeps a stack trace for each kind of device that may yet be initialized: a millisecond
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> None:
    """Hundreds of thousands of objects of imported modules and collected tests stay to the end: left out from here on.

    The garbage collector looked through them again and again, which took a seventh of the time of all tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def native_kernels() -> None:
    """For tests of the compiled kernels: they are skipped where these could not be compiled."""
    reason = why_missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cifar_dir() -> Path:
    """The folder with CIFAR-10 in its binary version, named by the environment variable FEDMEF_FX_DATA."""
    value = os.environ.get("FEDMEF_FX_DATA")
    if not value:
        pytest.skip("needs CIFAR-10: set FEDMEF_FX_DATA to the folder that holds data_batch_1.bin and test_batch.bin")
    folder = Path(value)
    missing = [name for name in ("data_batch_1.bin", "test_batch.bin") if not (folder / name).is_file()]
    if missing:
        # Whoever sets the variable wants these tests to run: a mistyped path must not look like success.
        pytest.fail(f"FEDMEF_FX_DATA={value}: no {' and no '.join(missing)} there; expected CIFAR-10's binary version")
    return folder
