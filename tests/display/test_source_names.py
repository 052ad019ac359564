"""Reasons name lines of the model's code, but not the folders of the machine that it ran on."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmef_fx import coverage, export_onnx, inspect, report, transform
from fedmef_fx.display.source_names import source_name, with_source_names

X = torch.linspace(-1.0, 1.0, 24).reshape(4, 6)
SOURCE = """
import torch
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Complaining(Branching):
    def forward(self, x):
        if isinstance(x, torch.fx.Proxy) or type(x) is not torch.Tensor:
            raise RuntimeError(f"{__file__}: takes tensors only")
        return self.layer(x)


class Untranslatable(Branching):
    def forward(self, x):
        return torch.special.bessel_j0(self.layer(x))
"""


@pytest.fixture(params=["installed.models.branching", "own_script"])
def source(request, tmp_path, monkeypatch):
    """A module of a package, or a file of its own, and the name that its lines should have."""
    name = request.param
    parts = name.split(".")
    file = tmp_path.joinpath(*parts).with_suffix(".py")
    file.parent.mkdir(parents=True, exist_ok=True)
    for folder in list(file.parents)[: len(parts) - 1]:
        (folder / "__init__.py").touch()
    file.write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    for depth in range(len(parts)):
        monkeypatch.delitem(importlib.sys.modules, ".".join(parts[: depth + 1]), raising=False)
    return importlib.import_module(name), "/".join(parts) + ".py"


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.part = nn.Linear(6, 6), part

    def forward(self, x):
        return self.part(self.first(x))


@pytest.mark.parametrize("kind", ["Branching", "Complaining"])
def test_no_document_names_the_folders(source, kind, tmp_path):
    module, name = source
    model = transform(Holder(getattr(module, kind)()), example_inputs=(X,))
    inspection = inspect(model, (X,))
    inspection.to_html(tmp_path / "page.html")
    documents = {
        "report": str(report(model)),
        "coverage": str(coverage(model)),
        "json": inspection.to_json(),
        "page": (tmp_path / "page.html").read_text(),
    }
    for what, text in documents.items():
        assert str(tmp_path) not in text, what
        assert str(Path.cwd()) not in text, what
    assert f"({name}:" in documents["report"]
    assert f"({name}:" in documents["coverage"]


def test_errors_of_the_export_name_the_file_within_its_package(source, tmp_path):
    module, name = source
    with pytest.raises(Exception, match="has no ONNX form") as caught:
        export_onnx(module.Untranslatable(), tmp_path / "m.onnx", example_inputs=(X,))
    assert f", {name}:" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_files_of_torch_are_named_within_torch():
    assert source_name(nn.modules.conv.__file__) == "torch/nn/modules/conv.py"


@pytest.mark.parametrize("name", ["<stdin>", "<eval_with_key>.3", "<ipython-input-1-0abc>"])
def test_what_is_no_file_keeps_its_name(name):
    assert source_name(name) == name


def test_paths_within_a_text():
    conv = nn.modules.conv.__file__
    text = f'see {conv}:12, File "/home/some one/net.py", line 3, and a/b.py, 3/4.py'
    assert with_source_names(text) == 'see torch/nn/modules/conv.py:12, File "net.py", line 3, and a/b.py, 3/4.py'
