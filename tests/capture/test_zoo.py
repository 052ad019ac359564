"""Third-party models, where their packages are installed; without pretrained weights, so nothing is downloaded."""

import copy
import importlib

import pytest
import torch

from fedmef_fx import coverage, transform
from tests.capture.test_any_model import IDENTITY, SPARSE, assert_masks_hold, assert_same, run, train

pytestmark = [pytest.mark.zoo, pytest.mark.slow, pytest.mark.filterwarnings("default")]

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
MODELS = [
    ("torchvision", "resnet18", {}),
    ("torchvision", "swin_t", {}),
    ("torchvision", "googlenet", {"aux_logits": True, "init_weights": False}),
    ("timm", "resnet10t", {}),
    ("timm", "test_vit", {"img_size": 64}),
    ("timm", "test_nfnet", {}),
    ("transformers", "Bert", TEXT),
    ("transformers", "GPT2", GPT),
    ("transformers", "ViT", VISION),
]


def package(name, *members):
    """A package, or some of its members; a skip where it is missing or does not load."""
    try:
        module = importlib.import_module(name)
        return [getattr(module, member) for member in members] or module
    except Exception as error:
        pytest.skip(f"needs {name}: {type(error).__name__}: {error}")


def build(source, name, options):
    """A model and a function that makes inputs for it."""
    torch.manual_seed(0)
    if source == "transformers":
        kind, settings = package(source, f"{name}Model", f"{name}Config")
        model = kind(settings(**options))
        if "image_size" in options:
            return model, lambda: ((), {"pixel_values": torch.randn(2, 3, 32, 32)})
        return model, lambda: ((), {"input_ids": torch.randint(5, 99, (2, 12))})
    if source == "timm":
        model = package(source).create_model(name, pretrained=False, num_classes=10, **options)
    else:
        model = package("torchvision.models").get_model(name, weights=None, num_classes=10, **options)
    return model, lambda: ((torch.randn(2, 3, 64, 64),), {})


@pytest.mark.parametrize(("source", "name", "options"), MODELS, ids=[f"{s}-{n}" for s, n, _ in MODELS])
def test_third_party_model(source, name, options):
    model, inputs = build(source, name, options)
    args, kwargs = inputs()
    counterpart = transform(model, IDENTITY, example_inputs=args, example_kwargs=kwargs)
    original = copy.deepcopy(model)
    for training in (False, True):
        call = inputs()
        assert_same(run(original, call, training=training), run(counterpart, call, training=training))
    assert set(model.state_dict()) <= set(counterpart.state_dict())
    sparse = transform(model, SPARSE, example_inputs=args, example_kwargs=kwargs)
    assert coverage(sparse).graph_fraction == 1
    train(sparse, inputs, steps=1)
    assert_masks_hold(sparse)
