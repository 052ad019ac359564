"""Pictures of masks, histograms, and what stands in a page's file."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.errors import ConfigError
from fedmef_fx.federated.history import History
from fedmef_fx.federated.rounds import RoundRecord
from fedmef_fx.inspection import Inspection, inspect
from fedmef_fx.inspection.page import Timeline
from fedmef_fx.inspection.page.mask_image import png
from fedmef_fx.inspection.weights import WeightRecord, record_weights
from tests.inspection.models import HOSTILE_NAMES, hostile, linear, two_convolutions
from tests.inspection.steps import step_memory

ROUND = RoundRecord(
    round_index=0,
    adjusted=True,
    clients=(0, 1),
    train_loss=1.5,
    test_loss=None,
    test_accuracy=0.5,
    density=0.5,
    bytes_down=10,
    bytes_up=20,
    seconds=0.1,
    peak_saved_bytes=30,
    churn={"fc.weight": 3},
)


def _sparse(density: float = 0.5) -> Inspection:
    return inspect(
        fedmef_fx.transform(two_convolutions(), Config(density=density, weight_storage="dense")),
        (torch.ones(1, 1, 8, 8),),
    )


def _document(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="document">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


def _record(mask: torch.Tensor, rate: float | None = 0.5) -> WeightRecord:
    values = torch.arange(1.0, int(mask.sum()) + 1).numpy()
    bits = np.packbits(mask.numpy().reshape(-1)).tobytes()
    return WeightRecord("w", tuple(mask.shape), values, is_sample=False, mask_bits=bits, adjustment_rate=rate)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 3, 3, 3), (7, 17)])
def test_small_mask_is_a_picture_of_its_bits(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.4
    picture = _record(mask).picture(4096)
    assert picture is not None
    assert picture.is_exact
    image = Image.open(io.BytesIO(png(picture))).convert("RGB")
    lit = np.asarray(image)[..., 0] > 128
    assert np.array_equal(lit, mask.flatten(1).numpy())


def test_large_mask_is_a_picture_of_its_density() -> None:
    mask = torch.zeros(40, 90, dtype=torch.bool)
    mask[:20, :30] = True
    picture = _record(mask).picture(100)
    assert picture is not None
    height, width = picture.levels.shape
    assert height * width <= 100
    assert picture.brightest == 1
    # A pixel that lies wholly in the active corner is full, one outside is empty.
    assert picture.levels[0, 0] == 255
    assert picture.levels[-1, -1] == 0
    decoded = np.asarray(Image.open(io.BytesIO(png(picture))))
    assert np.array_equal(decoded, np.rint(picture.levels / 255 * 15))


def test_brightest_pixel_is_the_densest_block() -> None:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[0, 0] = True
    picture = _record(mask).picture(100)
    assert picture is not None
    assert picture.brightest == pytest.approx(0.01)
    assert int(picture.levels.max()) == 255


def test_threshold_is_that_of_the_first_adjustment() -> None:
    record = _record(torch.ones(2, 5, dtype=torch.bool), rate=0.4)
    assert record.threshold() == 4.0  # of 1, 2, ..., 10 the 4 lowest go
    assert _record(torch.ones(2, 5, dtype=torch.bool), rate=None).threshold() is None
    assert _record(torch.ones(1, 2, dtype=torch.bool), rate=0.1).threshold() is None


def test_histogram_counts_active_values() -> None:
    record = _record(torch.tensor([[True, False, True]]))
    histogram = record.histogram(bins=4)
    assert histogram is not None
    assert (histogram.low, histogram.high, sum(histogram.counts)) == (-2.0, 2.0, 2)
    hopeless = WeightRecord("w", (1,), np.array([np.nan], np.float32), is_sample=False, mask_bits=None)
    assert hopeless.histogram() is None


def test_snapshot_does_not_follow_the_model() -> None:
    sparse = fedmef_fx.transform(two_convolutions(), Config(density=0.5, weight_storage="dense"))
    found = inspect(sparse)
    before = [record.values.copy() for record in found.weights]
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1)
    assert all(np.array_equal(a, b.values) for a, b in zip(before, found.weights, strict=True))


def test_packed_and_dense_storage_give_the_same_records() -> None:
    records = []
    for storage in ("dense", "packed"):
        torch.manual_seed(0)
        sparse = fedmef_fx.transform(two_convolutions(), Config(density=0.5, weight_storage=storage))
        records.append(inspect(sparse).weights)
    for dense, packed in zip(*records, strict=True):
        assert (dense.shape, dense.mask_bits, dense.threshold()) == (packed.shape, packed.mask_bits, packed.threshold())
        assert np.array_equal(dense.values, packed.values)


def test_bytes_kept_for_backward_stand_at_nodes_and_layers(tmp_path: Path) -> None:
    _sparse().to_html(tmp_path / "page.html", original=two_convolutions())
    document = _document(tmp_path / "page.html")
    after, before = document["saved"]
    assert 0 < after < before
    assert document["parameters"][1]["saved"] < document["parameters"][1]["saved_before"]
    assert any(codec == "bitmap" for node in document["views"][1]["nodes"] for codec, _, _ in node.get("sv", []))


def test_weight_without_a_mask_is_sampled_when_it_is_large() -> None:
    model = torch.nn.Linear(400, 300)
    (record,) = record_weights(model, ["weight"])
    assert record.is_sample
    assert record.values.size <= 2**16
    assert record.picture(100) is None
    assert record.threshold() is None


def test_page_allows_its_own_script_and_style_and_nothing_else(tmp_path: Path) -> None:
    _sparse().to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    policy = html.unescape(re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[0])
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content[-1].encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    outside = re.sub(r'xmlns="[^"]*"|"http://www.w3.org/2000/svg"', "", text)
    assert not re.search(r"https?://", outside)


def test_page_holds_graphs_before_and_after_with_what_changed(tmp_path: Path) -> None:
    _sparse().to_html(tmp_path / "page.html", title="small")
    document = _document(tmp_path / "page.html")
    assert document["title"] == "small"
    before, after = document["views"]
    passes = [entry["name"] for entry in document["passes"]]
    changed = {node["n"]: {passes[index] for index in node.get("ch", [])} for node in before["nodes"]}
    assert changed["conv1"] >= {"functionalize-weights", "insert-masks", "normalize-kernels"}
    assert changed["relu1"] == {"shrink-saved"}
    assert "input" not in changed or not changed["input"]
    assert [entry["parameter"] for entry in document["parameters"]] == ["conv1.weight", "conv2.weight"]
    assert after["root"]["c"][1]["l"] == "conv1"


def test_original_with_example_inputs_has_shapes(tmp_path: Path) -> None:
    found = _sparse()
    found.to_html(tmp_path / "plain.html")
    found.to_html(tmp_path / "shapes.html", original=two_convolutions())
    shapes = [
        [node.get("s") for node in _document(tmp_path / f"{name}.html")["views"][0]["nodes"]]
        for name in ("plain", "shapes")
    ]
    assert not any(shapes[0])
    assert shapes[1][1] == [["f32", [1, 8, 6, 6]]]


def test_page_of_a_model_that_is_not_transformed(tmp_path: Path) -> None:
    inspect(linear()).to_html(tmp_path / "page.html")
    document = _document(tmp_path / "page.html")
    assert [view["when"] for view in document["views"]] == ["after"]
    assert document["parameters"][0]["tier"] is None
    assert "mask" not in document["parameters"][0]


def test_notices_stand_in_the_page(tmp_path: Path) -> None:
    found = dataclasses.replace(_sparse(), notices=("nothing is known about x",))
    found.to_html(tmp_path / "page.html")
    assert _document(tmp_path / "page.html")["notices"] == ["nothing is known about x"]


def test_history_stands_in_the_page(tmp_path: Path) -> None:
    inspect(linear()).to_html(tmp_path / "page.html", history=History([ROUND], {"method": "fedmef"}))
    (written,) = _document(tmp_path / "page.html")["history"]["rounds"]
    assert written["churn"] == {"fc.weight": 3}


def test_long_step_keeps_its_phases_and_its_peak() -> None:
    short, long = (Timeline.of(step_memory(saved=4, repeats=repeats).timeline) for repeats in (1, 1000))
    assert short is not None
    assert long is not None
    assert short.phases == (("forward", 0), ("backward", 2))
    assert short.categories == {"weights": (8, 8, 8, 8), "saved": (0, 4, 4, 0)}
    assert short.moments == ("conv1, op", "relu1, op", "relu1, op", "model, op")
    assert len(long.moments) <= 600 + 2
    assert max(long.categories["saved"]) == 4
    assert [name for name, _ in long.phases] == ["forward", "backward"]
    assert Timeline.of(()) is None


def test_hostile_names_end_no_element(tmp_path: Path) -> None:
    names = [*HOSTILE_NAMES, "</script>", "<!--<script>", "\ud800"]
    inspect(hostile(*names)).to_html(tmp_path / "page.html", title="</title><script>")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<script\b", text)) == 2
    assert len(re.findall(r"</script", text)) == 2
    assert len(re.findall(r"</title", text)) == 1
    written = {entry["parameter"] for entry in _document(tmp_path / "page.html")["parameters"]}
    assert {f"{name}.weight" for name in names} == written


def test_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        _sparse().to_html(tmp_path / "absent" / "page.html")
    with pytest.raises(ConfigError, match="is a directory"):
        _sparse().to_html(tmp_path)


def test_same_model_gives_the_same_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(0)
        _sparse().to_html(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
