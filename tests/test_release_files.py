"""What releases and installations elsewhere are made from says the same as pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest

import fedmef_fx

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch"}


def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_conda_has_the_version_and_the_floors() -> None:
    recipe = _text("conda/meta.yaml")
    assert f'{{% set version = "{fedmef_fx.__version__}" %}}' in recipe
    run = recipe.partition("  run:\n")[2].partition("\ntest:")[0]
    listed = {line.strip("- ").replace(" ", "") for line in run.strip().splitlines()}
    floors = (dependency.split(">=") for dependency in PROJECT["dependencies"])
    wanted = {f"{CONDA_NAMES.get(name, name)}>={floor}" for name, floor in floors}
    assert listed == {*wanted, f"python{PROJECT['requires-python']}"}
    assert f"license: {PROJECT['license']}" in recipe
    assert all(f"{name} = {target}" in recipe for name, target in PROJECT["scripts"].items())


def test_the_container_runs_the_demo_and_is_short() -> None:
    lines = _text("Dockerfile").splitlines()
    assert len(lines) <= 15
    assert 'ENTRYPOINT ["fedmef-fx"]' in lines
    assert lines[-1] == 'CMD ["demo"]'


def test_every_python_is_tested() -> None:
    (listed,) = re.findall(r"python: \[(.*)\]", _text(".github/workflows/ci.yml"))
    versions = [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if "Python :: 3." in entry]
    assert re.findall(r'"([\d.]+)"', listed) == versions


def test_each_platform_that_the_docs_name_gets_a_wheel() -> None:
    (runners,) = re.findall(r"runner: \[(.*)\]", _text(".github/workflows/wheels.yml"))
    rows = re.findall(r"^\| .* \| `([a-z0-9_]+)` \|", _text("docs/installing.md"), flags=re.MULTILINE)
    assert len(rows) == len(runners.split(",")) == 4


@pytest.mark.parametrize("name", ["ci", "release", "wheels"])
def test_workflows_call_what_is_there(name: str) -> None:
    text = _text(f".github/workflows/{name}.yml")
    targets = re.findall(r"^([a-z -]+):", _text("Makefile"), flags=re.MULTILINE)
    known = {target for names in targets for target in names.split()}
    assert set(re.findall(r"make \S+=\S+ ([a-z-]+)", text)) <= known
    for workflow in re.findall(r"uses: \./(\S+)", text):
        assert (ROOT / workflow).is_file()


def test_ci_also_runs_what_needs_other_environments() -> None:
    called = set(re.findall(r"make PYTHON=python ([a-z-]+)", _text(".github/workflows/ci.yml")))
    assert called == {"test", "test-ecosystem", "test-flower", "docs"}
