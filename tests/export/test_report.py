"""The export report: plain values, JSON and a readable table."""

import json
from pathlib import Path

from fedmef_fx.export.report import ExportReport, Parity


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
        "over_entropy": None,
        "plain_nodes": 0,
        "tensors": [],
        "runtime": None,
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
