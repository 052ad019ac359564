"""Pictures: written in both formats, the same each time, for any names, and with errors that say what to install."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.display.plot_style import COLORS
from fedmef_fx.errors import ConfigError
from fedmef_fx.inspection import inspect
from fedmef_fx.inspection.plots import plot_sparsity
from fedmef_fx.inspection.table import LayerRow, Table
from tests.inspection.models import HOSTILE_NAMES, linear, two_convolutions


def _assert_picture(path: Path) -> None:
    if path.suffix == ".svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")  # noqa: S314  # our own file
    else:
        with Image.open(path) as image:
            # White would mean that nothing was drawn.
            assert len(image.convert("RGB").getcolors(maxcolors=2**24) or ()) > 20


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_sparsity_of_a_model(tmp_path: Path, suffix: str) -> None:
    model = two_convolutions()
    inspection = inspect(
        fedmef_fx.transform(model, Config(density=0.5, weight_storage="dense")), (torch.randn(2, 1, 8, 8),)
    )
    inspection.plot(tmp_path / f"a{suffix}", original=model)
    inspection.plot(tmp_path / f"b{suffix}", original=model)
    _assert_picture(tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    if suffix == ".svg":
        assert COLORS[0] in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_hostile_names_are_drawn_as_text(tmp_path: Path) -> None:
    names = [*HOSTILE_NAMES, "$\\frac{", "a_b^c$"]
    table = Table(tuple(LayerRow(name, (2,), 2, 1, saved=1, saved_before=2) for name in names))
    for suffix in (".png", ".svg"):
        plot_sparsity(table, tmp_path / f"s{suffix}")
        _assert_picture(tmp_path / f"s{suffix}")


def test_pictures_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspection = inspect(linear())
    with pytest.raises(ConfigError, match=r"Inspection\.plot: .*\.xyz: expected a file name that ends in \.png"):
        inspection.plot(tmp_path / "a.xyz")
    with pytest.raises(ConfigError, match=r"missing.* cannot be written"):
        inspection.plot(tmp_path / "missing" / "a.png")
    with pytest.raises(ConfigError, match="no prunable weights"):
        plot_sparsity(Table(()), tmp_path / "a.png")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedmef-fx\[viz\]'"):
        inspection.plot(tmp_path / "a.png")
