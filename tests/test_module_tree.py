"""Copies of models share nothing, and names lead to the modules that own what is named."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fedmef_fx.module_tree import duplicate_of, join, owner_of


def test_a_pruned_model_is_copied_without_sharing_a_tensor() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    model[0].bias.requires_grad_(False)

    copied = duplicate_of(model)

    x = torch.ones(1, 3)
    assert torch.equal(copied(x), model(x))
    assert not copied[0].bias.requires_grad
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in copied.state_dict().values()}


@pytest.mark.parametrize(("path", "name", "joined"), [("a", "b", "a.b"), ("", "b", "b"), ("a", "", "a"), ("", "", "")])
def test_paths_are_joined(path: str, name: str, joined: str) -> None:
    assert join(path, name) == joined


def test_the_owner_of_a_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    assert owner_of(model, "0.weight") == (model[0], "weight")
