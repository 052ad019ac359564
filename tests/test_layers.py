"""Which module may import which: read from the source, so that imports inside functions count as well."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# They hold the calls that users make, and so sit above everything.
UNRESTRICTED = ("fedmef_fx/transformation/transform.py", "fedmef_fx/cli.py")


def _sources() -> dict[str, str]:
    """Text of every module by its path in the repository; rglob does not follow the links to passes/ and export/."""
    paths = [path for folder in ("fedmef_fx", "passes", "export") for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def _imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a module imports, or reaches through an attribute of torch."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                # `from fedmef_fx import passes` names a module as much as `import fedmef_fx.passes` does.
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id="torch"), attr=name):
                yield node.lineno, f"torch.{name}"
            case _:
                pass


def _violations(
    sources: dict[str, str], folder: str, forbidden: Iterable[str], *, exempt: Iterable[str] = ()
) -> list[str]:
    """`path:line imports name` for every module under a folder that imports a forbidden package or a part of it."""
    prefixes = tuple(f"{name}." for name in forbidden)
    return [
        f"{path}:{line} imports {name}"
        for path, source in sources.items()
        if path.startswith(folder) and path not in exempt
        for line, name in _imports(source)
        if f"{name}.".startswith(prefixes)
    ]


def test_core_imports_no_passes_and_no_exporters() -> None:
    above = ("fedmef_fx.passes", "fedmef_fx.export")
    assert _violations(_sources(), "fedmef_fx/", above, exempt=UNRESTRICTED) == []


@pytest.mark.parametrize("folder", ["fedmef_fx/sparsity/", "fedmef_fx/memory/", "fedmef_fx/federated/"])
def test_knows_no_fx(folder: str) -> None:
    assert _violations(_sources(), folder, ["torch.fx"]) == []


def test_only_the_adapter_knows_flower() -> None:
    assert _violations(_sources(), "", ["flwr"], exempt=["fedmef_fx/federated/flower.py"]) == []


def test_imports_are_absolute() -> None:
    assert _violations(_sources(), "", [""]) == []


def test_every_folder_is_read() -> None:
    sources = _sources()
    assert {"fedmef_fx/config.py", "passes/__init__.py", "export/__init__.py"} <= sources.keys()
    assert not any(path.startswith(("fedmef_fx/passes/", "fedmef_fx/export/")) for path in sources)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.fx",
        "import torch.fx.passes.shape_prop as shapes",
        "from torch import fx",
        "from torch.fx import GraphModule",
        "import torch\ngraph = torch.fx.Graph()",
        "def build():\n    from torch.fx.graph import Graph\n    return Graph()",
        "import importlib\nfx = importlib.import_module('torch.fx')",
    ],
)
def test_the_check_sees_every_way_to_import(source: str) -> None:
    (violation,) = _violations({"fedmef_fx/memory/codec.py": source}, "fedmef_fx/memory/", ["torch.fx"])
    assert violation.startswith("fedmef_fx/memory/codec.py:")


@pytest.mark.parametrize(
    "source", ["import torch", "from torch import Tensor", "import torch.fxtra", "fx = 'torch.fx'"]
)
def test_the_check_leaves_the_rest_alone(source: str) -> None:
    assert _violations({"fedmef_fx/memory/codec.py": source}, "fedmef_fx/memory/", ["torch.fx"]) == []


@pytest.mark.parametrize(
    "source", ["from . import config", "from .config import Config", "from ..errors import PassError"]
)
def test_the_check_sees_relative_imports(source: str) -> None:
    assert len(_violations({"fedmef_fx/memory/codec.py": source}, "", [""])) == 1
