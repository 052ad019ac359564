"""Sizes that vary: multiples of what a network divides by, named or found out, equal sizes, ranges."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.errors import ConfigError
from fedmef_fx.export.sizes import VaryingSize, read_sizes, suggested_sizes

SIZES = {"x": {2: "height", 3: "width"}}


class Joined(nn.Module):
    """Halves an image twice, doubles it again and joins what has the same size."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, 1 if pooled else 2, 1) for _ in range(2))
        self.up = nn.ModuleList(nn.ConvTranspose2d(width, 16, 2, 2) for width in (16, 32))
        self.head = nn.Conv2d(32, 4, 1)
        self.pooled = pooled

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        b, c = self.down
        if self.pooled:
            middle = b(F.max_pool2d(a, 2)).relu()
            low = c(F.max_pool2d(middle, 2)).relu()
        else:
            middle = b(a).relu()
            low = c(middle).relu()
        middle = torch.cat([self.up[0](low), middle], 1)
        return self.head(torch.cat([self.up[1](middle), a], 1))  # type: ignore[no-any-return]


class Strided(nn.Module):
    """Halves an image five times, takes any size, and forgets it in the end."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 16, 16, 16, 16)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.gate, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Takes images apart into patches of 7 x 7 by reshaping, and asks for whole ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3 * 49, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        number, _, height, width = x.shape
        patches = x.reshape(number, 3, height // 7, 7, width // 7, 7).permute(0, 2, 4, 1, 3, 5)
        tokens = self.layer(patches.reshape(number, (height // 7) * (width // 7), 3 * 49)).relu()
        return self.head(tokens.mean(1))  # type: ignore[no-any-return]


def _exported(path: Path, model: nn.Module, shape: tuple[int, ...], sizes: Any, *, sparse: bool = True) -> Any:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = transform(model, Config(density=0.3), example_inputs=(x,)).eval() if sparse else model.eval()
    weights: Any = "packed" if sparse else "dense"
    report = export_onnx(model, path, example_inputs=(x,), dynamic_sizes=sizes, weights=weights)
    return model, report, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _check(model: nn.Module, session: Any, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            expected = model(x).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-5, atol=1e-5)


def _dims(path: Path) -> list[Any]:
    return [dim.dim_param or dim.dim_value for dim in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]


@pytest.mark.parametrize(("pooled", "sparse"), [(False, True), (True, False)])
def test_multiples_that_a_network_needs_are_found_out(tmp_path: Path, pooled: bool, sparse: bool) -> None:
    path = tmp_path / "m.onnx"
    model, report, session = _exported(path, Joined(pooled=pooled), (2, 3, 16, 24), SIZES, sparse=sparse)

    assert _dims(path) == ["batch", 3, "4*height", "4*width"]
    assert [notice.partition(",")[0] for notice in report.notices] == [
        "height is a multiple of 4",
        "width is a multiple of 4",
    ]
    assert "{'x': {2: '4*height'}}" in report.notices[0]
    _check(model, session, (3, 3, 32, 40), (1, 3, 12, 8))


def test_named_multiples_need_no_notice(tmp_path: Path) -> None:
    sizes = {"x": {2: "8*height", 3: "4*width"}}
    model, report, session = _exported(tmp_path / "m.onnx", Joined(), (2, 3, 16, 24), sizes)

    assert report.notices == ()
    assert _dims(tmp_path / "m.onnx") == ["batch", 3, "8*height", "4*width"]
    _check(model, session, (1, 3, 24, 4), (3, 3, 64, 44))


def test_a_strided_network_takes_images_of_other_sizes(tmp_path: Path) -> None:
    """Of 32 pixels one is left in the end, which torch.export would take for a constant."""
    model, report, session = _exported(tmp_path / "m.onnx", Strided(), (2, 3, 32, 32), SIZES)

    assert not any("fixed" in notice for notice in report.notices)
    _check(model, session, (1, 3, 128, 64), (2, 3, 64, 192), (3, 3, 32, 32))


def test_the_multiple_is_what_the_model_takes(tmp_path: Path) -> None:
    model, report, session = _exported(tmp_path / "m.onnx", Patches(), (2, 3, 28, 56), SIZES)

    assert report.notices[0].startswith("height is a multiple of 7, ")
    _check(model, session, (1, 3, 14, 21), (2, 3, 49, 28))


class Square(nn.Module):
    """Adds an image and what it is on its side."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + x.transpose(2, 3))  # type: ignore[no-any-return]


def test_sizes_that_have_to_be_equal_share_a_name(tmp_path: Path) -> None:
    model, report, session = _exported(tmp_path / "m.onnx", Square(), (2, 3, 8, 8), SIZES)

    (notice,) = report.notices
    assert notice.endswith("the model takes equal sizes alone")
    _, _, height, width = _dims(tmp_path / "m.onnx")
    assert height == width
    _check(model, session, (1, 3, 12, 12))


class Positions(nn.Module):
    """Knows eight positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(20, 16), nn.Embedding(8, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.weight[: x.shape[1]]
        return self.head(self.words(x) + places).mean(1)  # type: ignore[no-any-return]


def test_a_size_may_have_a_largest_value(tmp_path: Path) -> None:
    x = torch.arange(10).reshape(2, 5)
    model = Positions().eval()
    report = export_onnx(model, tmp_path / "m.onnx", example_inputs=(x,), dynamic_sizes={"x": {1: "length"}})

    assert report.notices[0].startswith("length is at most 8, ")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    x = torch.arange(16).reshape(2, 8)
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).detach(), rtol=1e-5, atol=1e-6)


def test_texts_of_sizes() -> None:
    sizes = read_sizes({"x": {1: "length", 2: "32*height"}})["x"]
    assert sizes == {1: VaryingSize("length"), 2: VaryingSize("height", 32)}
    assert [size.text for size in sizes.values() if size] == ["length", "32*height"]
    for text in ("batch", "4*batch", "0*n", "n*4", "4*", "*n", "3", "a b", ""):
        assert read_sizes({"x": {1: text}}) == {"x": {1: None}}, text


def test_an_example_has_to_be_such_a_multiple(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2: '32\*height', and the example has size 16 there; .*multiple of 32"):
        _exported(tmp_path / "m.onnx", Joined(), (2, 3, 16, 24), {"x": {2: "32*height"}})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("h = 4*_h\n  _h = Dim('_h', min=2, max=oo)", {2: VaryingSize("h", 4, 2), 3: VaryingSize("w")}),
        ("h = Dim('h', min=3, max=9)", {2: VaryingSize("h", 1, 3, 9), 3: VaryingSize("w")}),
        ("w = h", {2: VaryingSize("h"), 3: VaryingSize("h")}),
        ("w = 48", {2: VaryingSize("h")}),
        ("w = 48\n  h = 32", {}),
        ("w = 32*_w - 16\n  _w = Dim('_w', min=1)", None),
        ("batch = 2", None),
    ],
)
def test_suggestions_of_torch_export_are_read(lines: str, expected: Any) -> None:
    sizes = {"x": {2: VaryingSize("h"), 3: VaryingSize("w")}}
    found = suggested_sizes(sizes, f"Constraints violated\nSuggested fixes:\n  {lines}\n\nThe error above")

    assert found == (expected and {"x": expected} if expected != {} else {})
