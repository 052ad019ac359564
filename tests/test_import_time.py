"""`import fedmef_fx` stays cheap: what only some calls need is imported by those calls."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedmef_fx
from tests import forked

ROOT = Path(__file__).resolve().parent.parent
LOADED_ON_DEMAND = ["matplotlib", "networkx", "onnx", "onnxruntime", "onnxscript", "rich", "sklearn", "typer"]


@pytest.fixture(scope="module")
def modules_after_import() -> set[str]:
    code = "import sys, fedmef_fx; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603  # fixed command
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_package_itself_was_loaded(modules_after_import: set[str]) -> None:
    assert "fedmef_fx" in modules_after_import


@pytest.mark.parametrize("name", LOADED_ON_DEMAND)
def test_import_does_not_load(name: str, modules_after_import: set[str]) -> None:
    assert name not in modules_after_import


def check(code: str, folder: Path) -> None:
    done = forked.run(code, folder=folder)
    assert done.returncode == 0, done.stderr


def test_the_federation_is_an_attribute_that_is_imported_when_it_is_used(tmp_path: Path) -> None:
    code = (
        "import sys, fedmef_fx; assert 'fedmef_fx.federated' not in sys.modules; "
        "assert callable(fedmef_fx.federated.run); assert not hasattr(fedmef_fx, 'nothing')"
    )
    check(code, tmp_path)


def test_import_alone_does_not_wait_for_torch(modules_after_import: set[str]) -> None:
    assert "torch" not in modules_after_import


def test_every_public_name_is_there_and_listed() -> None:
    assert set(fedmef_fx.__all__) <= set(dir(fedmef_fx))
    for name in fedmef_fx.__all__:
        assert getattr(fedmef_fx, name) is getattr(fedmef_fx, name)
    with pytest.raises(AttributeError, match=r"module 'fedmef_fx' has no attribute 'nothing'"):
        _ = fedmef_fx.nothing  # type: ignore[attr-defined]  # which is what is tested


@pytest.mark.parametrize("name", ["models", "errors", "sparsity", "data", "passes", "export", "training"])
def test_rooms_are_attributes_without_an_import_of_their_own(name: str, tmp_path: Path) -> None:
    check(f"import fedmef_fx; assert fedmef_fx.{name}.__name__ == 'fedmef_fx.{name}'", tmp_path)


@pytest.mark.parametrize(
    "first",
    ["from fedmef_fx.transformation.transform import transform", "import fedmef_fx; fedmef_fx.load", "import pickle"],
)
def test_averages_and_wrappers_are_watched_from_the_first_transformed_model_on(first: str, tmp_path: Path) -> None:
    """Also where a model comes out of a pickle and nothing else of the package is imported."""
    model = fedmef_fx.transform(torch.nn.Sequential(torch.nn.Linear(4, 3)), fedmef_fx.Config(density=0.5))
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = f"""
{first}
import pickle, torch
model = pickle.loads(open({str(tmp_path / "model.pickle")!r}, "rb").read())
average = torch.optim.swa_utils.AveragedModel(model)
from torch.nn.modules.module import _global_module_registration_hooks as hooks
assert len(hooks) == 2, hooks
assert type(average) is not torch.optim.swa_utils.AveragedModel, "masks are obeyed"
"""
    check(code, tmp_path)
