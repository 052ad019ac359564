"""What the project says of itself is true wherever it says it: versions, floors, Pythons, links, citation."""

import re
import runpy
import subprocess
import sys
import tomllib
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedmef_fx

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TO_A_FILE = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(?:#[^)\s]*)?\)")
CODE = re.compile(r"```.*?```", flags=re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Message:
    """The metadata of a wheel, made from nothing but the files that say something about it."""
    source = tmp_path_factory.mktemp("source")
    for package in PYPROJECT["tool"]["setuptools"]["packages"]:
        (source / _folder(package)).mkdir(parents=True, exist_ok=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fedmef_fx/__init__.py"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)  # noqa: S603 -- our own code
    assert result.returncode == 0, result.stderr
    return message_from_string(next(source.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def noxfile() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "noxfile.py"))


def _folder(package: str) -> str:
    """Where a package lies in the repository."""
    for linked, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        if f"{package}.".startswith(f"{linked}."):
            return (folder + package.removeprefix(linked)).replace(".", "/")
    return package.replace(".", "/")


def _pinned() -> dict[str, Version]:
    files = [
        ROOT / name
        for name in ("constraints.txt", "constraints-ecosystem.txt", "constraints-docs.txt", "constraints-flower.txt")
    ]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins}


def test_one_version(built: Message) -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert built["Version"] == fedmef_fx.__version__
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [fedmef_fx.__version__]


def test_one_license(built: Message) -> None:
    assert "\nlicense: " + built["License-Expression"] + "\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_description_has_no_link_that_leads_nowhere(built: Message) -> None:
    description = built.get_payload()
    assert isinstance(description, str)
    assert built["Description-Content-Type"] == "text/markdown"
    assert TO_A_FILE.findall(description) == []
    assert "Guide (`docs/guide.md`)" in description
    assert "([arXiv 2403.14737](https://arxiv.org/abs/2403.14737))" in description


def test_code_in_the_description_is_the_readme_s(built: Message) -> None:
    assert CODE.findall(built.get_payload()) == CODE.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("[a](docs/b.md)", "a (`docs/b.md`)"),
        ("![a](b.png)", "a (`b.png`)"),
        ("[a\nb](c.md#d)", "a\nb (`c.md#d`)"),
        ("[a](https://b.c) [d](#e) [f](mailto:g@h.i)", "[a](https://b.c) [d](#e) [f](mailto:g@h.i)"),
        ("```\nx[0](y)\n```\n[a](b)", "```\nx[0](y)\n```\na (`b`)"),
    ],
)
def test_links_to_files_name_the_path(readme: str, expected: str) -> None:
    assert runpy.run_path(str(ROOT / "setup.py"))["long_description"](readme) == expected


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_the_repository_lead_somewhere(path: Path) -> None:
    targets = TO_A_FILE.findall(CODE.sub("", path.read_text(encoding="utf-8")))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_urls(built: Message) -> None:
    assert built.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2403.14737"]


def test_each_promised_python_is_tested(built: Message, noxfile: dict[str, Any]) -> None:
    promised = re.findall(r"Python :: (3\.\d+)\n", "\n".join(built.get_all("Classifier", [])) + "\n")
    assert promised
    assert set(promised) <= set(noxfile["PYTHONS"])
    assert built["Requires-Python"] == f">={noxfile['OLDEST']}" == f">={promised[0]}"


def test_floors_pin_every_direct_dependency(built: Message, noxfile: dict[str, Any]) -> None:
    requirements = [Requirement(text) for text in built.get_all("Requires-Dist", [])]
    direct = {f"{one.name}{one.specifier}" for one in requirements if one.name != built["Name"]}
    assert {line.replace("==", ">=") for line in noxfile["floors"](PROJECT)} == direct


def test_what_was_tested_is_at_or_above_the_floors(noxfile: dict[str, Any]) -> None:
    pinned = _pinned()
    floors = dict(line.split("==") for line in noxfile["floors"](PROJECT))
    assert {name for name in floors if canonicalize_name(name) not in pinned} == set()
    assert {name for name, floor in floors.items() if Version(floor) > pinned[canonicalize_name(name)]} == set()


@pytest.mark.parametrize(
    ("dependencies", "message"),
    [
        (["numpy"], "got 'numpy'; expected 'name>=version'"),
        (["numpy>=1,<3"], "got 'numpy>=1,<3'"),
        (["numpy>=1; python_version > '3.11'"], "python_version"),
        (["numpy>=1", "numpy>=2"], "numpy: got 'numpy>=2', elsewhere >=1"),
    ],
)
def test_a_requirement_without_one_floor_is_an_error(
    dependencies: list[str], message: str, noxfile: dict[str, Any]
) -> None:
    project = {"name": "fedmef-fx", "dependencies": dependencies, "optional-dependencies": {}}
    with pytest.raises(ValueError, match=re.escape(message)):
        noxfile["floors"](project)
