"""What models return besides tensors, and models of other floats than float32."""

import collections
import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import fedmef_fx
from fedmef_fx import Config, export_onnx, freeze
from fedmef_fx.errors import ConfigError

X = torch.linspace(-1.0, 1.0, 128).reshape(2, 64)
IMAGES = torch.linspace(-1.0, 1.0, 4 * 3 * 64).reshape(4, 3, 8, 8)


class Pair(NamedTuple):
    """A named tuple."""

    logits: Tensor
    hidden: Any


@dataclasses.dataclass
class Output:
    """A dataclass that torch does not know."""

    logits: Tensor
    hidden: Any = None
    loss: Tensor | None = None


class Returning(nn.Module):
    """Returns what a function makes of two tensors."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(64, 32), make

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.make(y, y * 2)


def _ordered(a: Tensor, b: Tensor) -> Any:
    return collections.OrderedDict(logits=a, hidden=b)


def _nested(a: Tensor, b: Tensor) -> Any:
    return Output(a, Pair(b, (a,)))


def _inside(a: Tensor, b: Tensor) -> Any:
    return Pair(a, collections.OrderedDict(first=Output(b)))


RESULTS = {
    "named tuple": (Pair, Pair),
    "dataclass": (Output, Output),
    "ordered": (_ordered, collections.OrderedDict),
    "nested": (_nested, Output),
    "inside": (_inside, Pair),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_any_class_are_frozen_and_exported(tmp_path: Path, name: str) -> None:
    make, kind = RESULTS[name]
    torch.manual_seed(0)
    sparse = fedmef_fx.transform(Returning(make), Config(density=0.4), example_inputs=(X,)).eval()
    expected = sparse(X)
    frozen = freeze(sparse)
    for module in (frozen, pickle.loads(pickle.dumps(frozen))):  # noqa: S301 -- our own bytes
        result = module(X)
        # torch.fx writes an OrderedDict as a dictionary of the same order when it reads a graph back.
        assert type(result) is (dict if module is not frozen and kind is collections.OrderedDict else kind)
        logits = result["logits"] if kind is collections.OrderedDict else result.logits
        assert torch.equal(logits, expected["logits"] if kind is collections.OrderedDict else expected.logits)
    export_onnx(sparse, tmp_path / "m.onnx", example_inputs=(X,))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert names[0] == "logits"
    assert all(name.startswith("hidden") for name in names[1:])
    np.testing.assert_allclose(
        session.run(None, {session.get_inputs()[0].name: X.numpy()})[0], logits.detach(), 1e-5, 1e-6
    )


class Layer:
    """Keys and values of one layer, as transformers keeps them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.dtype = keys, values, keys.dtype


class Cache:
    """Layers, a class, a dictionary with numbers as keys."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.layers, self.kind, self.is_updated = [Layer(a, b), Layer(b, a)], Layer, {0: True}


class Holder:
    """A cache of two."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.own, self.other = Cache(a, b), Cache(b, a)


CACHES = {
    "in a dataclass": (lambda a, b: Output(a, Cache(a, b)), ["logits"], "hidden", 4),
    "of two": (lambda a, b: Pair(a, Holder(a, b)), ["logits"], "hidden", 8),
    "in a tuple": (lambda a, b: (a, Cache(b, a)), ["output_0"], "output_1", 4),
    "in a dictionary": (lambda a, b: {"logits": a, "past": Cache(a, b), "more": b}, ["logits", "more"], "past", 4),
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("is_sparse", [True, False])
def test_caches_are_written_when_they_are_asked_for(tmp_path: Path, name: str, is_sparse: bool) -> None:
    make, names, cache, number = CACHES[name]
    model: nn.Module = Returning(make)
    if is_sparse:
        model = fedmef_fx.transform(model, Config(density=0.4), example_inputs=(X,)).eval()
    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(X,))
    assert [value.name for value in _session(tmp_path).get_outputs()] == names
    kind = "Holder" if name == "of two" else "Cache"
    assert report.notices[0] == f"left out {cache}, a {kind}: outputs=[..., '{cache}'] writes its tensors"

    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(X,), outputs=[names[0], cache])
    written = [value.name for value in _session(tmp_path).get_outputs()]
    assert written[0] == names[0]
    assert len(written) == 1 + number
    assert all(name.startswith(f"{cache}_") and name.endswith(("_keys", "_values")) for name in written[1:])
    assert not report.notices
    assert report.parity is not None
    assert report.parity.max_abs < 1e-6


def test_a_frozen_model_makes_its_cache_anew(tmp_path: Path) -> None:
    sparse = fedmef_fx.transform(Returning(Holder), Config(density=0.4), example_inputs=(X,)).eval()
    frozen = freeze(sparse)
    frozen.graph.eliminate_dead_code()
    frozen.recompile()
    for module in (frozen, copy.deepcopy(frozen)):
        first, second = module(X), module(2 * X)
        assert type(first) is Holder
        assert type(first.own) is Cache
        assert first.own.kind is Layer
        assert first.other.is_updated == {0: True}
        assert first.own.layers[1].dtype is torch.float32
        assert torch.equal(first.other.layers[0].keys, sparse(X).other.layers[0].keys)
        assert not torch.equal(first.own.layers[0].keys, second.own.layers[0].keys)


def test_outputs_are_chosen_by_name(tmp_path: Path) -> None:
    model = Returning(lambda a, b: {"logits": a, "hidden": (b, a), "hidden_states": b})
    export_onnx(model, tmp_path / "m.onnx", example_inputs=(X,), outputs=["hidden"])
    assert [value.name for value in _session(tmp_path).get_outputs()] == ["hidden_0", "hidden_1"]
    with pytest.raises(ConfigError, match=r"outputs=\['loss'\].*some of 'logits', 'hidden', 'hidden_states'"):
        export_onnx(model, tmp_path / "m.onnx", example_inputs=(X,), outputs=["logits", "loss"])


def _session(folder: Path) -> Any:
    return onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])


def test_a_plain_model_with_a_dataclass_is_exported_and_keeps_its_forward(tmp_path: Path) -> None:
    model = Returning(Output)
    export_onnx(model, tmp_path / "m.onnx", example_inputs=(X,))
    assert "forward" not in vars(model)
    assert isinstance(model(X), Output)


class Normalised(nn.Module):
    """A convolution whose BatchNorm becomes a normalised kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_models_of_other_floats_become_float32(tmp_path: Path, dtype: torch.dtype, storage: Any) -> None:
    torch.manual_seed(0)
    model = fedmef_fx.transform(
        Normalised().to(dtype), Config(density=0.3, weight_storage=storage), example_inputs=(IMAGES.to(dtype),)
    ).eval()
    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(IMAGES.to(dtype),), weights="packed")
    name = str(dtype).removeprefix("torch.")
    assert f"converted from {name} to float32: inputs and outputs of the file are float32" in report.notices
    assert report.parity is not None
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0])
    expected = model(IMAGES.to(dtype)).detach().double()
    # The model itself rounds to its type in every layer.
    assert float((out.double() - expected).abs().max()) <= 8 * torch.finfo(dtype).eps + 1e-6
    assert next(model.parameters()).dtype == dtype


class Upsampling(nn.Module):
    """A grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(3, 12, 3, groups=3), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_what_has_no_int8_form_stays_float32_and_is_named(tmp_path: Path) -> None:
    model = fedmef_fx.transform(Upsampling(), Config(density=0.5), example_inputs=(IMAGES,))
    report = export_onnx(
        model, tmp_path / "m.onnx", example_inputs=(IMAGES,), quantize="int8", calibration_data=[IMAGES]
    )
    assert any("stays float32: a grouped ConvTranspose has no int8 form" in notice for notice in report.notices)
    assert report.parity is not None
    assert report.parity.max_rel < 0.1
