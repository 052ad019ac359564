"""Layers keep a packed input; one copy serves all layers that read it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmef_fx.ops.keeping import KeepActivation
from fedmef_fx.ops.pack_activation import PackActivation
from fedmef_fx.passes.compress_saved import CompressSaved
from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.prune_activations import PruneActivations
from fedmef_fx.passes.shrink_saved import ShrinkSaved
from tests.passes.programs import program_for, refusals_of, run, text_of

FIRST = (FunctionalizeWeights(), InsertMasks(0.5), ShrinkSaved())


class Branches(nn.Module):
    """Two layers on one activation."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 2, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.left(x), self.right(x)


def sites_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_one_site_serves_both_readers():
    program = program_for(Branches())
    result = run(program, *FIRST, PruneActivations(0.75, 128, 4, packed_dtype="float16"))
    assert result.rewrites == ("linear", "linear_1", "linear_2")
    assert text_of(program).splitlines()[4:] == [
        "sign_relu = sign_relu(pruned_linear)",
        "fedmef_sites_sign_relu = fedmef_sites.sign_relu(sign_relu)",
        "left_weight = left.weight",
        "left_weight_mask = left.weight_mask",
        "pruned_linear_1 = pruned_linear(sign_relu, fedmef_sites_sign_relu, left_weight, left_weight_mask)",
        "right_weight = right.weight",
        "right_weight_mask = right.weight_mask",
        "pruned_linear_2 = pruned_linear(sign_relu, fedmef_sites_sign_relu, right_weight, right_weight_mask)",
        "return pruned_linear_1, pruned_linear_2",
    ]
    (site,) = sites_of(program.model, PackActivation)
    assert site.activation_sparsity == 0.75


def test_what_stays_dense_is_not_packed_and_says_why():
    program = program_for(Branches())
    result = run(program, *FIRST, PruneActivations())
    assert refusals_of(result) == {"x": "stays dense: an input of the model, which its caller holds"}


def test_with_nothing_dropped_inputs_are_kept_in_8_bits():
    program = program_for(Branches())
    run(program, *FIRST, PruneActivations(activation_sparsity=0.0))
    assert len(sites_of(program.model, KeepActivation)) == 1
    assert not sites_of(program.model, PackActivation)


def test_a_tensor_that_is_kept_in_8_bits_already_is_not_packed_again():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    program = program_for(model)
    run(program, FunctionalizeWeights(), InsertMasks(0.5), CompressSaved(), ShrinkSaved(), PruneActivations())
    assert not sites_of(model, PackActivation)
    assert "recomputed" in text_of(program), "the second layer's input is computed again from the first one's result"


class RunTime(nn.Module):
    """A stride that is known only when the model runs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight, None, (x.size(2) // 4, 1))


@pytest.mark.parametrize(
    ("model", "ignore", "where", "reason"),
    [
        (RunTime(), (), "conv2d", "its geometry is computed at run time"),
        (nn.Sequential(nn.Conv2d(3, 4, 2, padding="same")), (), "conv2d", 'padding="same" that is not symmetric'),
        (nn.Sequential(nn.Linear(4, 4)), ("0",), "linear", "ignored by Config.ignore"),
    ],
    ids=["run time", "asymmetric", "ignored"],
)
def test_refusals_change_nothing(model, ignore, where, reason):
    program = program_for(model)
    run(program, *FIRST)
    before = text_of(program)
    result = run(program, PruneActivations(ignore=ignore))
    assert refusals_of(result) == {where: reason}
    assert not result.modified
    assert text_of(program) == before


def test_a_second_run_finds_nothing():
    program = program_for(Branches())
    run(program, *FIRST, PruneActivations())
    before = text_of(program)
    assert not run(program, PruneActivations()).modified
    assert text_of(program) == before
