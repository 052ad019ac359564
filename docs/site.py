"""What `make docs` adds to the pages in this folder: the reference, the tutorials with their output, and the recipes.

Nothing of it is written by hand, so that nothing of it can be out of date: the reference lists what the packages
export, and fails for a name without a docstring; tutorials and recipes are scripts, and tutorials run while the site is
built.
"""

import ast
import contextlib
import io
import os
import re
import tempfile
import traceback
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = {
    "fedmef_fx": ["fedmef_fx", "fedmef_fx.checkpoint.hub"],
    "results": [
        "fedmef_fx.sparse_model.transformation:Coverage PrunableParameter",
        "fedmef_fx.records.memory_plan",
        "fedmef_fx.measure.report",
        "fedmef_fx.inspection",
        "fedmef_fx.fitting",
        "fedmef_fx.fitting.sensitivity:LayerSensitivity",
        "fedmef_fx.export.compact.report:CompactLayer",
        "fedmef_fx.export.onnx.report:Parity Runtime",
        "fedmef_fx.export.onnx.int8_records:LayerPrecision",
        "fedmef_fx.export.onnx.file_records",
        "fedmef_fx.export.onnx.manifest:Manifest ManifestTensor",
        "fedmef_fx.export.onnx.unpack:UnpackedFile",
        "fedmef_fx.export.training.report:DeviceCheck",
    ],
    "federated": [
        "fedmef_fx.federated",
        "fedmef_fx.federated.flower",
        "fedmef_fx.federated.objective:Evaluated",
        "fedmef_fx.federated.messages:Report",
        "fedmef_fx.federated.methods.policies:Adjustment AfterRound Opening",
        "fedmef_fx.federated.demo",
    ],
    "passes": [
        "fedmef_fx.passes",
        "fedmef_fx.graph.operators.operator:Operator",
        "fedmef_fx.graph.signature:Signature AnyTensors",
        "fedmef_fx.sparse_model.transformation:Transformation",
    ],
    "training": [
        "fedmef_fx.training.adjustment",
        "fedmef_fx.training.clipping",
        "fedmef_fx.training.distributed",
        "fedmef_fx.sparse_model.optimizer_state",
    ],
    "sparsity": ["fedmef_fx.sparsity"],
    "models": ["fedmef_fx.models", "fedmef_fx.data"],
    "errors": ["fedmef_fx.errors"],
}
"""Page of the reference -> the modules whose public names it lists, or `module:Name Name` for some of them."""

_PAGES_OF = {
    r"\.\./examples": "recipes.md",
    r"\.\./examples/(\w+)\.py": r"recipes.md#\1",
    r"tutorials/(\w+)\.py": r"tutorials/\1.md",
    r"\.\./fedmef_fx/__init__\.py": "reference/fedmef_fx.md",
}
"""Link to a file, as a pattern -> the page that is made of it."""


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are made."""
    package, listed = griffe.load("fedmef_fx", search_paths=[ROOT], resolve_aliases=True), set()
    pages = {f"reference/{name}.md": _reference(package, name, modules, listed) for name, modules in REFERENCE.items()}
    for script in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        pages[f"tutorials/{script.stem}.md"] = _tutorial(script)
    pages["recipes.md"] = _recipes(sorted((ROOT / "examples").glob("*.py")))
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Let links to what pages are made of lead to these pages, and name other files; a code host follows both."""
    for source, target in _PAGES_OF.items():
        markdown = re.sub(rf"\]\({source}\)", rf"]({target})", markdown)
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        path = (folder / link[2]).resolve()
        has_page = path.suffix == ".md" and path.is_relative_to(ROOT / "docs")
        return link[0] if has_page or not path.is_file() else f"`{path.relative_to(ROOT)}`"

    return re.sub(r"(?<!!)\[([^\[\]]+)\]\(([^()\s#:]+)\)", named, markdown)


def public_names(listed: str) -> tuple[str, list[str]]:
    """A module and what it exports, or what of it is listed."""
    module, _, names = listed.partition(":")
    return module, names.split() or exported(module)


def exported(module: str) -> list[str]:
    """What a module exports."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise PluginError(f"{path}: no __all__")


def _reference(package: Any, page: str, modules: list[str], listed: set[str]) -> str:
    """A page of what modules export; what another page has, and modules that have a page, are left out."""
    parts = [f"# {page}\n"]
    for module, names in map(public_names, modules):
        if len(modules) > 1:
            parts.append(f"`{module}`\n")
        for name in names:
            member = package[f"{module}.{name}".removeprefix("fedmef_fx.")]
            if member.is_module or member.canonical_path in listed:
                continue
            if not member.has_docstring:
                raise PluginError(f"{module}.{name} is public and has no docstring")
            listed.add(member.canonical_path)
            parts.append(f"::: {member.canonical_path}\n")
    return "\n".join(parts)


def cells(script: str) -> list[tuple[bool, str]]:
    """The cells of a script with `# %%` marks: whether it is text, and what is in it."""
    found = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        is_text = "[markdown]" in head
        found.append((is_text, re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_text else body.strip("\n")))
    return found


def _tutorial(path: Path) -> str:
    """A page of a script: its text, its code, and what the code printed just now."""
    names: dict[str, Any] = {"__name__": "__main__"}
    parts = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for is_text, body in cells(path.read_text(encoding="utf-8")):
                if is_text:
                    parts.append(body)
                    continue
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(body, str(path), "exec"), names)
                output = printed.getvalue().rstrip()
                parts.append(f"```python\n{body}\n```\n" + (f"\n```text\n{output}\n```\n" if output else ""))
        except Exception as error:
            raise PluginError(f"{path}: {traceback.format_exc()}") from error
        finally:
            os.chdir(before)
    return "\n".join(parts)


def _recipes(paths: list[Path]) -> str:
    parts = ["# Recipes\n\nWhole scripts in `examples/`, each of which is tested as it stands.\n"]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        title = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0].rstrip(".")
        parts.append(f"## {title} {{ #{path.stem} }}\n\n`examples/{path.name}`\n\n```python\n{text}```\n")
    return "\n".join(parts)
