"""Sums of NSConv branches are scaled so that their variance stays what it was; others stay."""

import math

import pytest
import torch
from torch import nn

from fedmef_fx.passes.functionalize import FunctionalizeWeights
from fedmef_fx.passes.insert_masks import InsertMasks
from fedmef_fx.passes.normalize_kernels import NormalizeKernels
from fedmef_fx.passes.rescale_residuals import RescaleResiduals
from tests.passes.programs import program_for, refusals_of, run, text_of

FIRST = (FunctionalizeWeights(), InsertMasks(0.5), NormalizeKernels())


class Block(nn.Module):
    """A residual sum; `add` says how it is written."""

    def __init__(self, add, *, norm=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.add = add

    def forward(self, x):
        return self.add(self.norm(self.conv(x)), x).relu()


def in_place(a, b):
    a += b
    return a


def seen_before(a, b):
    total = a.flatten(1)
    total += b.flatten(1)
    return total + a.flatten(1)


@pytest.mark.parametrize(
    "add",
    [lambda a, b: a + b, lambda a, b: b + a, torch.add, lambda a, b: a.add(b), in_place],
    ids=["a + b", "b + a", "torch.add", "a.add(b)", "a += b"],
)
def test_a_sum_gets_the_factor_once(add):
    program = program_for(Block(add))
    result = run(program, *FIRST, RescaleResiduals())
    ((_, _, graph),) = program.graphs()
    (scaled,) = (node for node in graph.nodes if getattr(node.target, "__name__", "") == "mul")
    assert result.rewrites == (scaled.args[0].name,)
    assert scaled.args[1] == math.sqrt(0.5)
    assert [user.target for user in scaled.users] == ["relu"]
    before = text_of(program)
    assert not run(program, RescaleResiduals()).modified
    assert text_of(program) == before


@pytest.mark.parametrize(
    "model",
    [
        Block(torch.add, norm=False),
        Block(lambda a, b: a * b),
        Block(lambda a, b: a + 1),
        Block(lambda a, b: torch.add(a, b, alpha=2)),
        Block(lambda a, b: a.relu() + b),
    ],
    ids=["no NSConv", "product", "number", "alpha", "nonlinearity between"],
)
def test_what_is_no_sum_straight_from_a_normalised_layer_stays(model):
    program = program_for(model)
    run(program, *FIRST)
    before = text_of(program)
    result = run(program, RescaleResiduals())
    assert (result.rewrites, result.refusals) == ((), ())
    assert text_of(program) == before


def test_a_sum_that_others_see_through_their_tensor_is_refused():
    program = program_for(Block(seen_before))
    run(program, *FIRST)
    result = run(program, RescaleResiduals())
    assert set(refusals_of(result).values()) == {"it is written into a tensor that others read"}


def test_a_sum_that_python_may_compute_without_the_factor_is_refused():
    program = program_for(Block(torch.add))
    run(program, *FIRST)
    (region,) = program.regions
    region.signature = object()  # any: calls that do not fit it run the Python code
    before = text_of(program)
    result = run(program, RescaleResiduals())
    assert refusals_of(result) == {"add": "the model's Python code may run for other calls, without the factor"}
    assert text_of(program) == before
