"""What the site is made of: public names have their place in the reference, links lead to files that are there."""

import ast
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmef_fx import Config
from fedmef_fx.transformation.recipe import passes_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
SCRIPTS = [*sorted((ROOT / "docs" / "tutorials").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]


def _assigned(path: Path, name: str) -> Any:
    """What a file assigns to a name, as it is written there."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} assigns nothing to {name}")


def _source(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _reference() -> dict[str, list[str]]:
    """Module -> its names that the site lists."""
    names: dict[str, list[str]] = {}
    for entry in (entry for page in _assigned(ROOT / "docs" / "site.py", "REFERENCE").values() for entry in page):
        module, _, some = entry.partition(":")
        source = _source(module)
        assert source is not None, module
        names.setdefault(module, []).extend(some.split() or _assigned(source, "__all__"))
    return names


REFERENCE = _reference()
LISTED = {name for names in REFERENCE.values() for name in names}


def _functions(value: Any) -> Iterator[Any]:
    if inspect.isclass(value):
        yield value
        members = [member for name, member in vars(value).items() if not name.startswith("_")]
        yield from (member for each in members if callable(member := getattr(each, "fget", each)))
    elif callable(value):
        yield value


def _parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part)


def _types_of(value: Any) -> Iterator[type]:
    """Classes of the project in the annotations of something public."""
    for function in _functions(value):
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError):  # types that are imported for type checkers alone
            continue
        for part in (part for hint in hints.values() for part in _parts(hint)):
            if isinstance(part, type) and part.__module__.startswith("fedmef_fx") and not part.__name__.startswith("_"):
                yield part


@pytest.mark.parametrize("module", ["fedmef_fx", "fedmef_fx.federated", "fedmef_fx.passes"])
def test_what_public_names_take_and_give_has_a_page(module: str) -> None:
    package = importlib.import_module(module)
    missing = {
        f"{name}: {given.__module__}.{given.__name__}"
        for name in package.__all__
        for given in _types_of(getattr(package, name))
        if given.__name__ not in LISTED
    }
    assert missing == set()


def test_what_pages_and_examples_import_has_a_page() -> None:
    texts = "\n".join(path.read_text(encoding="utf-8") for path in [*PAGES, *SCRIPTS])
    imports = re.findall(r"^ *from (fedmef_fx[\w.]*) import (?:\(([^)]*)\)|([\w ,]+))", texts, flags=re.MULTILINE)
    names = {(module, name.strip()) for module, many, few in imports for name in (many or few).split(",")}
    names = {(module, name) for module, name in names if name and _source(f"{module}.{name}") is None}
    assert len(names) > 30
    assert {(module, name) for module, name in names if name not in LISTED} == set()


def test_the_guide_names_all_passes_in_their_order() -> None:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("| pass | rewrite |")[2]
    named = re.findall(r"^\| `([a-z-]+)` \|", text.partition("\n\n")[0], flags=re.MULTILINE)
    assert named == [step.name for step in passes_of(Config(saved_precision="int8"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if ":" in file:
            continue
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there), target


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
