"""Frozen models of torchvision and timm are models of theirs: their methods, TorchScript and quantisation take them."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fedmef_fx import Config, freeze, transform
from tests.ecosystem.networks import CONFIG

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

MODELS: dict[str, Any] = {
    "torchvision resnet18": lambda: models.resnet18(num_classes=4),
    "torchvision mobilenet_v2": lambda: models.mobilenet_v2(num_classes=4, width_mult=0.25),
    "torchvision mobilenet_v3_small": lambda: models.mobilenet_v3_small(num_classes=4, width_mult=0.25),
    "torchvision shufflenet": lambda: models.shufflenet_v2_x0_5(num_classes=4),
    "timm resnet10t": lambda: timm.create_model("resnet10t", num_classes=4),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=4),
    "timm convnext": lambda: timm.create_model(
        "convnext_atto", num_classes=4, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)
    ),
    "timm vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, depth=2, embed_dim=48, patch_size=8
    ),
}


def _trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def _scripts(model: nn.Module) -> bool:
    try:
        torch.jit.script(model)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("normalization", ["nsconv", "keep"])
@pytest.mark.parametrize("name", MODELS)
def test_frozen_models_are_of_their_class(name: str, normalization: str) -> None:
    original = _trained(name)
    sparse = transform(original, CONFIG.replace(normalization=normalization)).eval()
    plain = freeze(sparse)

    assert type(plain) is type(original)
    with torch.no_grad():
        expected = sparse(X)
        torch.testing.assert_close(plain(X), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        if hasattr(plain, "forward_features"):
            torch.testing.assert_close(plain.forward_head(plain.forward_features(X)), plain(X))
        again = copy.deepcopy(original)
        again.load_state_dict(freeze(sparse, batch_norms="keep").state_dict())
        torch.testing.assert_close(again(X), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _scripts(original):
            assert torch.allclose(torch.jit.script(plain)(X), plain(X), rtol=1e-4, atol=1e-5)


def test_torchvisions_own_fusion_and_quantisation_take_it() -> None:
    from torch.ao import quantization  # noqa: PLC0415 -- slow to import

    torch.manual_seed(0)
    original = models.quantization.mobilenet_v2(num_classes=4, width_mult=0.25, quantize=False).eval()
    sparse = transform(original, Config(density=0.5, normalization="keep")).eval()
    plain = freeze(sparse, batch_norms="keep")
    expected = plain(X)
    plain.fuse_model()
    torch.testing.assert_close(plain(X), expected, rtol=1e-3, atol=1e-5)
    plain.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(plain)
    prepared(X)
    assert "Quantized" in str(quantization.convert(prepared))
