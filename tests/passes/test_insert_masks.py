"""Prunable weights are read through masks, each once; what stays dense says why."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fedmef_fx.errors import ConfigError
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from tests.passes.programs import program_for, refusals_of, run, text_of


def two_layers():
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def masks_of(model):
    return {name.removesuffix("_mask"): buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}


def test_every_use_of_a_weight_goes_through_its_mask():
    program = program_for(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU()))
    result = run(program, FunctionalizeWeights(), InsertMasks(0.5))
    assert result.rewrites == ("0.weight",)
    assert text_of(program).splitlines() == [
        "_0_weight = 0.weight",
        "_0_weight_mask = 0.weight_mask",
        "masked_weight = masked_weight(_0_weight, _0_weight_mask)",
        "linear = linear(input_1, masked_weight)",
        "_1 = 1(linear)",
        "return _1",
    ]


@pytest.mark.parametrize("mask_init", ["random", "magnitude"])
@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_the_budget_is_kept_and_masked_weights_are_zero(mask_init, allocation):
    model = two_layers()
    run(program_for(model), FunctionalizeWeights(), InsertMasks(0.25, allocation, mask_init))
    masks = masks_of(model)
    assert sum(int(mask.sum()) for mask in masks.values()) == 18  # a quarter of 48 + 24
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()


def test_the_seed_alone_chooses_random_masks():
    drawn = []
    for seed in (0, 0, 1):
        model = two_layers()
        run(program_for(model), FunctionalizeWeights(), InsertMasks(0.5, seed=seed))
        drawn.append(masks_of(model)["0.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_mask_of_another_tool_stays_pruned():
    model = two_layers()
    prune.random_unstructured(model[0], "weight", amount=0.75)
    pruned = model[0].weight_mask == 0
    program = program_for(model)
    result = run(program, FunctionalizeWeights(), InsertMasks(0.9, mask_init="magnitude"))
    assert "0.weight_orig" in result.rewrites
    assert not masks_of(model)["0.weight_orig"][pruned].any()


def test_at_density_one_nothing_changes_but_what_is_known():
    model = two_layers()
    program = program_for(model)
    run(program, FunctionalizeWeights())
    before = text_of(program)
    assert not run(program, InsertMasks(1.0)).modified
    assert text_of(program) == before
    assert masks_of(model) == {}
    assert [prunable.masked for prunable in program.transformation.prunable.values()] == [False, False]


class Reasons(nn.Module):
    """A weight for each reason to stay dense."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 8)
        self.kept, self.frozen, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.frozen.weight.requires_grad_(False)
        self.unread = nn.Linear(8, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))

    def forward(self, tokens):
        x = self.words(tokens) + self.position
        return F.linear(self.head(self.frozen(self.kept(x))), self.words.weight[:, :4])


def test_what_stays_dense_says_why():
    model = Reasons()
    result = run(program_for(model), FunctionalizeWeights(), InsertMasks(0.5, ignore=("kept",)))
    assert result.rewrites == ("head.weight",)
    reasons = refusals_of(result)
    assert reasons["kept.weight"] == "ignored by Config.ignore"
    assert reasons["frozen.weight"] == "frozen (requires_grad is False)"
    assert reasons["unread.weight"] == "nothing that was traced or recorded reads it"
    assert "position" not in reasons, "no product reads it"


def test_a_model_without_prunable_weights_is_an_error():
    with pytest.raises(ConfigError, match="has no prunable weights"):
        run(program_for(nn.Sequential(nn.BatchNorm1d(4))), InsertMasks(0.5))


def test_masks_are_drawn_once():
    model = two_layers()
    program = program_for(model)
    run(program, FunctionalizeWeights(), InsertMasks(0.5))
    before, text, facts = masks_of(model), text_of(program), program.transformation.prunable
    result = run(program, InsertMasks(0.1, seed=7))
    assert refusals_of(result) == dict.fromkeys(before, "it has a mask already, which fedmef_fx.set_masks changes")
    assert not result.modified
    assert text_of(program) == text
    assert program.transformation.prunable == facts
    assert all(torch.equal(before[name], mask) for name, mask in masks_of(model).items())


def test_a_kernel_that_was_normalised_without_a_mask_takes_none():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    program = program_for(model)
    result = run(program, FunctionalizeWeights(), InsertMasks(1.0), NormalizeKernels(), InsertMasks(0.5))
    assert result.rewrites == ("2.weight",)
    assert refusals_of(result) == {"0.weight": "an earlier pass made its layer one for a weight without a mask"}
