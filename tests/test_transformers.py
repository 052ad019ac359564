"""The reference transformers: shapes, causality, initial loss, bad sizes."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedmef_fx.errors import ConfigError
from fedmef_fx.models.transformers import gpt2_bytes, vit_tiny


def test_vit_takes_digits():
    model = vit_tiny(image_size=8, patch_size=2, in_channels=1, dim=48, depth=2)
    logits = model(torch.randn(4, 1, 8, 8))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gpt2_sees_the_past_only():
    model = gpt2_bytes(dim=32, depth=2, heads=4).eval()
    tokens = torch.randint(256, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = torch.randint(256, (2, 8))
    with torch.no_grad():
        first, second = model(tokens), model(changed)
    # The kernel works on blocks of positions; what it rounds may depend on what is in a block.
    assert torch.allclose(first[:, :12], second[:, :12], atol=1e-6)
    assert not torch.allclose(first[:, 12:], second[:, 12:], atol=1e-3)


def test_gpt2_starts_as_undecided_as_it_should_and_ties_its_head():
    model = gpt2_bytes()
    assert model.head.weight is model.token_embed.weight
    tokens = torch.randint(256, (4, 129))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    # Logits have a deviation of about 0.02 * sqrt(256) = 0.32, which adds half its square to log(256).
    assert loss.item() == pytest.approx(math.log(256), abs=0.15)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gpt2_bytes(depth=0), "gpt2_bytes: got depth=0; expected an integer >= 1"),
        (lambda: gpt2_bytes(heads=7), "gpt2_bytes: got dim=256 and heads=7; expected one that heads divides"),
        (lambda: vit_tiny(patch_size=5), "vit_tiny: got image_size=32 and patch_size=5; expected one that"),
        (lambda: vit_tiny(dim=True), "vit_tiny: got dim=True; expected an integer"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ConfigError) as error:
        build()
    assert str(error.value).startswith(message)
