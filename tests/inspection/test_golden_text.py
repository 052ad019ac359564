"""Graph texts of hand-made models, written out; `UPDATE_GOLDEN=1 pytest tests/inspection` writes them anew."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config
from fedmef_fx.inspection import inspect
from tests.inspection.models import PerMode, Residual, Tied, linear, two_convolutions

GOLDEN = Path(__file__).parent.parent / "golden"
LONGEST = 15
MASKS_ONLY = Config(density=0.5, normalization="keep", activation_sparsity=0, weight_storage="dense")


class Case(NamedTuple):
    """A model, and per pass how much it rewrote and refused."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    config: Config | None
    counts: dict[str, tuple[int, int]]


CASES = {
    "original": Case(two_convolutions, (2, 1, 8, 8), None, {}),
    "masks": Case(linear, (3, 4), MASKS_ONLY, {"functionalize-weights": (1, 0), "insert-masks": (1, 0)}),
    "tied": Case(Tied, (3, 4), MASKS_ONLY, {"functionalize-weights": (2, 0), "insert-masks": (1, 0)}),
    "everything": Case(
        two_convolutions,
        (2, 1, 8, 8),
        Config(density=0.5, activation_sparsity=0.9, weight_storage="dense"),
        {
            "functionalize-weights": (2, 0),
            "insert-masks": (2, 0),
            "normalize-kernels": (1, 0),
            "rescale-residuals": (0, 0),
            "shrink-saved": (1, 0),
            "prune-activations": (2, 1),
        },
    ),
    "residual": Case(
        Residual,
        (2, 4, 5, 5),
        Config(density=0.5, activation_sparsity=0, weight_storage="dense"),
        {
            "functionalize-weights": (1, 0),
            "insert-masks": (1, 0),
            "normalize-kernels": (1, 0),
            "rescale-residuals": (1, 0),
        },
    ),
    "per_mode": Case(
        PerMode,
        (3, 4),
        Config(density=1, normalization="keep", activation_sparsity=0, weight_storage="dense"),
        {"functionalize-weights": (1, 0), "insert-masks": (0, 0)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_text_and_counts(name: str) -> None:
    case = CASES[name]
    model = case.build()
    if case.config is not None:
        model = fedmef_fx.transform(model, case.config)
    # Values that differ, so that a threshold divides them.
    x = torch.linspace(-2, 3, math.prod(case.shape)).reshape(case.shape)
    inspection = inspect(model, (x,))
    text = f"{inspection}\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    counts = {r.name.partition("{")[0]: (len(r.rewrites), len(r.refusals)) for r in inspection.passes}
    assert counts.pop("capture", (1, 0)) == (1, 0)
    assert counts == case.counts


def test_table_before_and_after() -> None:
    model, x = two_convolutions(), torch.linspace(-2, 3, 128).reshape(2, 1, 8, 8)
    config = Config(density=0.5, activation_sparsity=0.9, weight_storage="dense")
    text = f"{inspect(fedmef_fx.transform(model, config), (x,)).table(model)}\n"
    path = GOLDEN / "table.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
