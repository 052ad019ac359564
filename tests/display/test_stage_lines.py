"""The logger `fedmef_fx`: what it says of a transformation and an export, and the line on a terminal."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from fedmef_fx import Config, export_onnx, transform
from fedmef_fx.display.stages import stage, watching_stages

LOGGER = logging.getLogger("fedmef_fx")


def test_the_logger_says_what_was_done_and_refused(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.DEBUG, logger="fedmef_fx"):
        sparse = transform(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), Config(density=0.5))
        export_onnx(sparse, tmp_path / "net.onnx", example_inputs=(torch.ones(2, 8),))
    said = [
        (record.levelname, record.getMessage()) for record in caplog.records if record.name.startswith("fedmef_fx.")
    ]
    assert ("INFO", "insert-masks: 2 rewritten, 0 refused") in said
    assert ("INFO", "transform: Sequential: 2 of 2 prunable parameters have masks") in said
    assert ("DEBUG", "export: verify") in said
    assert any(level == "INFO" and text.startswith(f"export: {tmp_path / 'net.onnx'}: ") for level, text in said)
    assert any(level == "DEBUG" and text.startswith("prune-activations refused input") for level, text in said)


def test_nothing_is_printed_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("fedmef_fx.anything").warning("something went wrong")
    transform(nn.Sequential(nn.Linear(8, 4)), Config(density=0.5))
    assert capsys.readouterr() == ("", "")


def test_stages_are_shown_while_they_are_watched() -> None:
    shown: list[str] = []
    before = (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers))
    with watching_stages(shown.append), stage(logging.getLogger("fedmef_fx.x"), "first"):
        logging.getLogger("fedmef_fx.x").info("no stage")
    with stage(logging.getLogger("fedmef_fx.x"), "unseen"):
        pass
    assert shown == ["first"]
    assert (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers)) == before
