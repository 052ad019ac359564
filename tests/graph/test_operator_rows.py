"""The table of operators: nothing else names one, and one row is all that a new one needs."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import FedmefError
from fedmef_fx.export.freeze import frozen_graph
from fedmef_fx.graph.emit import program_of
from fedmef_fx.graph.operators import Activation, operator, operator_of, register, rows
from fedmef_fx.ops.named import NAMED
from fedmef_fx.ops.smooth import compressed_activation

ROOT = Path(fedmef_fx.__file__).parent
# What implements operators, and models that are made of them.
OUTSIDE = ("graph/operators/", "ops/", "models/", "federated/")  # which compares losses, and has no graphs
# Modules that compute nothing themselves.
CONTAINERS = (
    nn.DataParallel,
    nn.Module,
    nn.ModuleDict,
    nn.ModuleList,
    nn.ParameterDict,
    nn.ParameterList,
    nn.Sequential,
)
SPACES = {"nn": nn, "F": F, "torch": torch}


def _sources() -> dict[str, Path]:
    folders = [ROOT, *(path for path in ROOT.iterdir() if path.is_dir())]  # which may be links
    return {
        str(p.relative_to(ROOT)): p for folder in folders for p in folder.glob("*.py" if folder == ROOT else "**/*.py")
    }


def _handled(path: Path) -> set[object]:
    """Functions and modules of torch that code decides by: in tables, tests of identity and of classes."""
    found: set[object] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Set | ast.Tuple | ast.List):
            found |= _torch_names(node.elts)
        elif isinstance(node, ast.Dict):
            found |= _torch_names([key for key in node.keys if key is not None])
        elif isinstance(node, ast.Compare):
            found |= _torch_names([node.left, *node.comparators])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            found |= _torch_names([*node.args[1:], *_alternatives(node.args[-1])])
    return found


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    return [node]


def _torch_names(nodes: list[ast.expr]) -> set[object]:
    names = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    things = (getattr(SPACES.get(n.value.id), n.attr, None) for n in names if n.value.id in SPACES)  # type: ignore[attr-defined]
    return {thing for thing in things if _is_operator(thing)}


def _is_operator(thing: object) -> bool:
    if isinstance(thing, type):
        return issubclass(thing, nn.Module) and thing not in CONTAINERS
    home = getattr(thing, "__module__", "") or ""
    return isinstance(thing, BuiltinFunctionType) or (callable(thing) and home.startswith("torch.nn.functional"))


def test_every_operator_that_is_handled_anywhere_has_a_row() -> None:
    sources = _sources()
    assert {"passes/shrink_saved.py", "export/freeze/plain_ops.py", "inspection/costs.py"} <= set(sources)
    assert _handled(sources["graph/operators/activations.py"]) >= {nn.GELU, nn.PReLU}
    handled = {name: _handled(path) for name, path in sources.items() if not name.startswith(OUTSIDE)}
    missing = {name: {t for t in things if operator_of(t) is None} for name, things in handled.items()}
    assert {name: things for name, things in missing.items() if things} == {}


def test_no_table_but_this_one_names_an_activation() -> None:
    names = {name for row in rows() if row.is_nonlinearity for name in (row.name, *(m.__name__ for m in row.modules))}
    assert {"gelu", "GELU"} <= names
    for path, source in _sources().items():
        if path.startswith(OUTSIDE):
            continue
        tree = ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        tables = [node for node in tree if isinstance(node, ast.Set | ast.Dict | ast.Tuple | ast.List)]
        texts = {n.value for table in tables for n in ast.walk(table) if isinstance(n, ast.Constant)}
        assert not {text for text in texts if isinstance(text, str)} & names, path
        assert not {t for t in _handled(source) if getattr(t, "__name__", "") in names}, path


def test_two_rows_for_one_name_are_refused() -> None:
    with pytest.raises(FedmefError, match="has a row already"):
        register(Activation(name="own", functions=(F.gelu,)))


def squash(x: Tensor) -> Tensor:
    """An activation that torch does not have."""
    return x * torch.sigmoid(1.5 * x)


class Squash(nn.Module):
    """Its module."""

    def forward(self, x: Tensor) -> Tensor:
        return squash(x)


@pytest.fixture
def _one_row() -> Iterator[None]:
    tables = (operator._ROWS, operator._NAMES, NAMED)
    before = [dict(table) for table in tables]  # type: ignore[call-overload]
    register(Activation(name="squash", functions=(squash,), modules=(Squash,), in_8_bits="input"))
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        Squash(),
        nn.Conv2d(16, 16, 3, padding=1),
        Squash(),
        nn.Flatten(),
        nn.Linear(16 * 64, 4),
    )


@pytest.mark.usefixtures("_one_row")
def test_one_row_is_all_that_a_new_activation_needs(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    plain = fedmef_fx.transform(_network(), Config(density=0.5, activation_sparsity=0.0), example_inputs=(x,))
    config = Config(density=0.5, saved_precision="int8", activation_sparsity=0.2)
    model = fedmef_fx.transform(_network(), config, example_inputs=(x,))

    # Transformed: its gain scales the kernel before it, and it keeps 8 bits.
    gains = {node.kwargs.get("g") for _, _, graph in program_of(model).graphs() for node in graph.nodes} - {None, 1.0}
    assert len(gains) == 1
    called = [node.kwargs.get("function") for node in model.graph.nodes if node.target is compressed_activation]
    assert called == ["squash", "squash"]
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        assert torch.nn.functional.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) > 0.8

    # Counted: inspection knows what it keeps.
    assert "saved=" in str(fedmef_fx.inspect(model, (x,)))
    assert fedmef_fx.memory(model, (x,)).saved_total < fedmef_fx.memory(plain, (x,)).saved_total

    # Frozen and exported.
    model.eval()
    frozen = frozen_graph(model)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)
    assert squash in {node.target for node in frozen.graph.nodes} or any(
        isinstance(m, Squash) for m in frozen.modules()
    )
    fedmef_fx.export_onnx(model, tmp_path / "m.onnx", example_inputs=(x,))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(out, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_one_row")
def test_channel_masks_pass_a_new_activation() -> None:
    x = torch.randn(4, 3, 8, 8)
    config = Config(density=0.5, granularity="channel")
    model = fedmef_fx.transform(_network(), config, example_inputs=(x,)).eval()
    small = fedmef_fx.compact(fedmef_fx.freeze(model), (x,))
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
