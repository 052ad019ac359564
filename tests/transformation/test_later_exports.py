"""Layers that were changed after `transform`: exported, compacted, and loaded into a model that has them, too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import fedmef_fx
from fedmef_fx import Config, transform
from fedmef_fx.export.onnx.onnx_file import Weights
from tests.later_models import CONFIGS, Net, X


def new_head(model: Net) -> None:
    model.reset_classifier(7)


def no_head(model: Net) -> None:
    model.reset_classifier(0)


def more_blocks(model: Net) -> None:
    model.blocks = nn.Sequential(model.blocks[0], nn.Conv2d(8, 8, 1), nn.ReLU(), model.blocks[1])


CHANGES = pytest.mark.parametrize("change", [new_head, no_head, more_blocks])


@CHANGES
@pytest.mark.parametrize(("name", "weights"), [("dense", "packed"), ("packed", "dense"), ("keep", "packed")])
def test_exported(change: Callable[[Net], None], name: str, weights: Weights, tmp_path: Path) -> None:
    sparse = transform(Net(), CONFIGS[name])
    sparse(X)
    change(sparse)
    fedmef_fx.export_onnx(sparse.eval(), tmp_path / "m.onnx", example_inputs=(X,), weights=weights)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    (result,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(result, sparse(X).detach().numpy(), rtol=1e-5, atol=1e-5)


@CHANGES
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_compacted(change: Callable[[Net], None], granularity: str) -> None:
    sparse = transform(Net(), Config(density=0.5, granularity=granularity))
    change(sparse)
    compacted = fedmef_fx.compact(sparse.eval(), (X,))
    torch.testing.assert_close(compacted(X), sparse(X), rtol=1e-4, atol=1e-5)
    assert not hasattr(compacted, "fedmef")


@CHANGES
@pytest.mark.parametrize("name", CONFIGS)
def test_loaded_into_an_original_with_the_same_layers(change: Callable[[Net], None], name: str, tmp_path: Path) -> None:
    sparse, original = transform(Net(), CONFIGS[name]), Net()
    change(sparse)
    change(original)
    fedmef_fx.save(sparse, tmp_path / "m.safetensors")
    loaded = fedmef_fx.load(tmp_path / "m.safetensors", original)
    assert set(fedmef_fx.masks(loaded)) == set(fedmef_fx.masks(sparse))
    assert torch.equal(loaded.eval()(X), sparse.eval()(X))
