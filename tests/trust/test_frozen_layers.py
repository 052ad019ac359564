"""Layers that need no gradient keep their masks through the adjustment that the guide shows."""

import pytest
import torch
from torch import nn

from fedmef_fx import Config, Extrusion, growth_candidates, masks, set_masks, transform
from fedmef_fx.sparse_model.masks import masked_parameters
from fedmef_fx.sparsity import adjust_mask


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_a_layer_frozen_afterwards_is_neither_pruned_nor_grown(storage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    sparse = transform(model, Config(density=0.5, weight_storage=storage))
    frozen = masked_parameters(sparse)["2.weight"]
    frozen.parameter.requires_grad_(False)
    before = {name: mask.clone() for name, mask in masks(sparse).items()}
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05)
    with Extrusion(sparse, optimizer, budget_steps=1) as extrusion:
        sparse(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
    assert "2.weight" not in extrusion.marked
    candidates = growth_candidates(sparse, lambda m, x: m(x).square().mean(), [torch.randn(16, 8)])
    new = {
        name: adjust_mask(parameter.dense(), parameter.mask, candidates[name], 10)
        for name, parameter in masked_parameters(sparse).items()
    }
    set_masks(sparse, new)
    after = masks(sparse)
    assert torch.equal(after["2.weight"], before["2.weight"])
    assert not torch.equal(after["0.weight"], before["0.weight"])
