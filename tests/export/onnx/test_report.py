"""The export report: plain values, JSON and a readable table."""

import dataclasses
import json
from pathlib import Path

import pytest

from fedmef_fx.export.onnx.manifest import ManifestTensor
from fedmef_fx.export.onnx.report import ExportReport, Parity, Runtime


def _report(parity: Parity | None) -> ExportReport:
    return ExportReport(
        path=Path("model.onnx"),
        bytes=2_000,
        dense_bytes=9_000,
        opset=20,
        nodes=12,
        parity=parity,
        seconds={"freeze": 0.25, "convert": 2.0},
        notices=("fixed batch size 4: it says so",),
    )


PARITY = Parity(max_abs=1.5e-6, max_rel=2.5e-7, top1_agreement=0.75, batches=3, batch_sizes=(8, 1, 8))


def test_ratio_is_how_many_times_smaller() -> None:
    assert _report(None).ratio == 4.5


def test_as_dict_survives_json() -> None:
    values = _report(PARITY).as_dict()

    assert json.loads(json.dumps(values)) == {
        "path": "model.onnx",
        "bytes": 2_000,
        "dense_bytes": 9_000,
        "ratio": 4.5,
        "opset": 20,
        "nodes": 12,
        "parity": {
            "max_abs": 1.5e-6,
            "max_rel": 2.5e-7,
            "top1_agreement": 0.75,
            "batches": 3,
            "batch_sizes": [8, 1, 8],
        },
        "seconds": {"freeze": 0.25, "convert": 2.0},
        "notices": ["fixed batch size 4: it says so"],
        "weights": "dense",
        "quantize": None,
        "plain_bytes": 0,
        "entropy_bytes": 0.0,
        "exponent_entropy_bytes": 0.0,
        "over_entropy": None,
        "over_exponent_entropy": None,
        "plain_nodes": 0,
        "tensors": [],
        "runtime": None,
        "layers": [],
    }


def test_text_has_a_line_per_fact() -> None:
    assert str(_report(PARITY)).splitlines() == [
        "file    model.onnx",
        "size    2,000 bytes; parameters 9,000 bytes, 4.50 times the file",
        "graph   12 nodes, opset 20",
        "parity  max abs 1.5e-06, max rel 2.5e-07, top-1 agreement 75.00%, over 3 batches of size 8, 1",
        "time    freeze 0.25 s, convert 2.00 s",
        "notice  fixed batch size 4: it says so",
    ]


def test_text_says_what_was_not_verified() -> None:
    assert "parity  not verified" in str(_report(None))
    without_rows = Parity(0.0, 0.0, None, 1, (2,))
    assert "top-1" not in str(_report(without_rows))


ENCODED = dataclasses.replace(
    _report(PARITY),
    weights="packed",
    plain_bytes=10_000,
    entropy_bytes=1_900.0,
    plain_nodes=7,
    tensors=(ManifestTensor("conv.<weight>", "a", (4, 3, 3, 3), "rice3/float32", 27, 120, "conv2d"),),
    runtime=Runtime(5, 5, 0.04, 0.02, 1.01),
)


def test_encoded_weights_have_a_table() -> None:
    lines = str(ENCODED).splitlines()

    assert lines[2] == "weights packed; 10,000 bytes as dense float32, 5.00 times the file, 5.3% over the entropy bound"
    assert lines[3] == "graph   12 nodes, opset 20; 7 without decoders and quantizers"
    assert lines[5] == (
        "runtime 5 nodes run, 0 of them decoders; session 0.04 s, plain 0.02 s; latency 1.01 times plain"
    )
    assert lines[-2:] == [
        "tensor         shape    codec          density  bytes",
        "conv.<weight>  4x3x3x3  rice3/float32    0.250    120",
    ]


def test_a_file_below_the_bound_of_whole_values_says_so() -> None:
    report = dataclasses.replace(ENCODED, entropy_bytes=2_500.0, exponent_entropy_bytes=1_960.0)

    assert report.over_exponent_entropy == pytest.approx(40 / 1_960)
    assert "20.0% under the entropy bound, 2.0% over that with the entropy of exponents" in str(report)


def test_an_encoded_report_survives_json() -> None:
    values = json.loads(json.dumps(ENCODED.as_dict()))

    assert values["over_entropy"] == pytest.approx(2_000 / 1_900 - 1)
    assert values["tensors"] == [
        {
            "name": "conv.<weight>",
            "value": "a",
            "shape": [4, 3, 3, 3],
            "codec": "rice3/float32",
            "active": 27,
            "bytes": 120,
            "node": "conv2d",
            "density": 0.25,
        }
    ]
    assert values["runtime"]["latency_ratio"] == 1.01


def test_notebooks_show_tables_with_escaped_names() -> None:
    html = ENCODED._repr_html_()

    assert html.count("<table") == 2
    assert "conv.&lt;weight&gt;</td>" in html
    assert "4x3x3x3</td>" in html
    assert "<weight>" not in html
    assert _report(None)._repr_html_().count("<table") == 1
