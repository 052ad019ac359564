"""Frozen and exported models do not depend on how the weights were stored."""

from pathlib import Path

import pytest
import torch

from fedmef_fx import Config, export_onnx, freeze, transform
from tests.models import ZOO, build


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("name", ZOO)
def test_frozen_models_are_equal(name: str, normalization: str) -> None:
    model, inputs = build(name)
    frozen = []
    for storage in ("dense", "packed"):
        config = Config(density=0.4, normalization=normalization, weight_storage=storage)
        frozen.append(freeze(transform(model, config)))
    left, right = (plain.state_dict() for plain in frozen)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key
    outputs = [torch.utils._pytree.tree_leaves(plain(*inputs)) for plain in frozen]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_freezing_leaves_the_packed_model_alone() -> None:
    model, inputs = build("residual")
    packed = transform(model, Config(density=0.4, weight_storage="packed")).eval()
    expected = packed(*inputs)  # a call moves the thresholds of activations
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    plain = freeze(packed)
    assert torch.allclose(plain(*inputs), expected, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in packed.state_dict().items())
    assert torch.equal(packed(*inputs), expected)


def test_onnx_files_are_equal(tmp_path: Path) -> None:
    model, inputs = build("residual")
    files = []
    for storage in ("dense", "packed"):
        path = tmp_path / f"{storage}.onnx"
        export_onnx(transform(model, Config(density=0.4, weight_storage=storage)), path, example_inputs=inputs)
        files.append(path.read_bytes())
    assert files[0] == files[1]
