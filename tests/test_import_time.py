"""`import fedmef_fx` stays cheap: what only some calls need is imported by those calls."""

import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_federation_is_an_attribute_that_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, fedmef_fx; assert 'fedmef_fx.federated' not in sys.modules; "
        "assert callable(fedmef_fx.federated.run); assert not hasattr(fedmef_fx, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 -- our own code
