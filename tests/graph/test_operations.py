"""The rows of activations are the only place that names them, and one row makes an activation known."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import fedmef_fx
from fedmef_fx.graph import activations
from fedmef_fx.graph.operations import nonlinearity, operation_of
from fedmef_fx.graph.program import Region
from fedmef_fx.graph.saves import kept_by

ROOT = Path(fedmef_fx.__file__).parent
# Code that implements or uses activations, and two modules that still name the ReLU family: see their docstrings.
OUTSIDE = ("graph/activations.py", "ops/", "models/", "passes/shrink_saved.py", "export/freeze/plain_ops.py")


def _named(path: Path) -> set[str]:
    known = {row.name for row in activations.rows()} | {row.module.__name__ for row in activations.rows()}
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("nn", "F", "torch")
        ):
            names.add(node.attr)
        elif isinstance(node, ast.Set | ast.Dict | ast.Tuple | ast.List):
            entries = node.keys if isinstance(node, ast.Dict) else node.elts
            names |= {x.value for x in entries if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    return {name for name in names if name.removesuffix("_") in known}


def _sources() -> dict[str, Path]:
    folders = [ROOT, *(path for path in ROOT.iterdir() if path.is_dir())]  # which may be links
    return {
        str(p.relative_to(ROOT)): p for folder in folders for p in folder.glob("*.py" if folder == ROOT else "**/*.py")
    }


def test_no_table_outside_the_rows_names_an_activation() -> None:
    sources = _sources()
    assert {"passes/_compressible.py", "export/freeze/batch_norm.py", "graph/saves.py"} <= set(sources)
    assert _named(sources["graph/activations.py"]) >= {"GELU", "gelu"}
    named = {name: _named(path) for name, path in sources.items() if not name.startswith(OUTSIDE)}
    assert {name: names for name, names in named.items() if names} == {}


class _Toy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


def _toy(x: Tensor) -> Tensor:
    return x * x.sigmoid()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = _Toy()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def test_one_row_makes_an_activation_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = _Net(), fx.Graph()
    node = graph.call_module("act", (graph.placeholder("x"),))
    graph.output(node)
    region = Region("", model, {"both": graph})
    assert operation_of(region, node).kind == "unknown"
    assert kept_by(region, node).output
    row = activations.Activation("_toy", _Toy, _toy)
    for name in (row.module, *row.targets):
        monkeypatch.setitem(activations.ACTIVATIONS, name, row)
    assert operation_of(region, node).kind == "elementwise"
    assert kept_by(region, node) == (True, False)
    function, x = nonlinearity(region, node), torch.linspace(-2, 2, 9)
    assert function is not None
    torch.testing.assert_close(function(x), _toy(x))
